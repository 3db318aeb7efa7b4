"""Values that a run's config takes from the config around it.

Another repository may compose a run's config below a key of its own, and refer to other keys of its own there.
"""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.errors import Problem, first_line, refuse

# The start of each interpolation in a text: its dots, the name after them, and the colon after a resolver's name
_REFERENCE = re.compile(r"\$\{\s*(\.*)([^${}:]*)(:?)")
_READS_KEYS = re.compile(r"oc\.(select|deprecated|dict\.keys|dict\.values)\s*")  # resolvers that take a key


def fix_outer_values(run: DictConfig, composed: DictConfig) -> None:
    """Replace the interpolations in `run` that point out of it by their values in `composed`.

    `run` is a copy of the node `composed`, without its parents. In it, such an interpolation would find nothing, or
    another key of the same name. Raises ConfigErrors for an interpolation without a value.
    """
    problems: list[Problem] = []
    _fix(run, composed, 0, "", problems)
    refuse(problems)


def _fix(run: Any, composed: Any, depth: int, path: str, problems: list[Problem]) -> None:
    for key in list(run) if isinstance(run, DictConfig) else range(len(run)):
        name = f"{path}[{key}]" if isinstance(run, ListConfig) else f"{path}.{key}".removeprefix(".")
        node = run._get_node(key)
        if not OmegaConf.is_interpolation(run, key):
            if isinstance(node, (DictConfig, ListConfig)) and not (node._is_none() or node._is_missing()):
                _fix(node, composed[key], depth + 1, name, problems)
        elif _is_outer(node._value(), depth):
            try:
                value = composed[key]
                is_node = isinstance(value, (DictConfig, ListConfig))
                run[key] = OmegaConf.to_container(value, resolve=True) if is_node else value
            except OmegaConfBaseException as error:
                reason = first_line(error).split("resolving interpolation: ")[-1].strip('"')
                fix = "name a key of the whole config, or begin with dots for a key of the run (${..model.lr})"
                problems.append(Problem(name, f"'{node._value()}' can't be resolved: {reason}", fix))


def _is_outer(text: str, depth: int) -> bool:
    """Return True if `text`, `depth` levels below the run's node, refers to a key outside this node."""
    for dots, name, colon in _REFERENCE.findall(text):
        if colon and not dots:
            if _READS_KEYS.fullmatch(name):
                return True
        elif not dots or len(dots) - 1 > depth:
            return True
    return False
