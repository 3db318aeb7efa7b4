"""What is wrong with overrides that Hydra refuses: all of them at once, each with the nearest valid name.

Hydra stops at the first. Here each is tried on top of those that compose, so that one mistake hides no other.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from loraplus_hydra.check.values import select, set_elsewhere
from loraplus_hydra.cli.arguments import flags_and_overrides
from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import CLOSED_GROUPS, GROUPS, RunConfig, run_of
from loraplus_hydra.config.synonyms import meant_keys, meant_option
from loraplus_hydra.errors import Problem, first_line, nearest
from loraplus_hydra.sweep.plugins import missing_plugin

ROOT_KEYS = (*(field.name for field in fields(RunConfig)), "sweep", "experiment", "hparams_search", "launcher", "debug")


def has_unknown_key(arguments: list[str]) -> bool:
    """Whether an override's first word is surely none of ours, so that composing the config first would be in vain.

    Never where other configs may come in: behind a `+`, or with flags such as --config-dir.
    """
    if any(argument.startswith(("--config", "-c", "--shell", "-sc", "hydra.searchpath")) for argument in arguments):
        return False
    words = (re.match(r"(\w+)[.=/@]", text) for text in flags_and_overrides(arguments)[1])
    return any(word is not None and word[1] not in (*ROOT_KEYS, "hydra") for word in words)


def is_of_composing(error: BaseException) -> bool:
    """Whether an error comes from reading or composing the config: Hydra's own, or one that its code stumbled over."""
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return True
    places = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(places) and places[-1].split(".")[0] in ("hydra", "omegaconf", "antlr4", "yaml")


def override_problems(arguments: list[str], config: str, first_error: Exception | None = None) -> list[Problem]:
    """One Problem for each override in `arguments` that doesn't compose with the YAML `config`; flags are left out.

    `first_error` is what Hydra said, if it was asked: a single override needs no second try to be known as the culprit.
    """
    overrides = get_args_parser().parse_known_args(arguments)[0].overrides
    problems: list[Problem] = []
    accepted: list[str] = []
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        for text in overrides:
            try:
                override = OverridesParser.create().parse_override(text)
            except HydraException as error:
                problems.append(_grammar_problem(text, error))
                continue
            if config == "config" and has_unknown_key([text]):
                problems.append(_unknown_key(override.key_or_group, text, lambda: _compose(config, accepted)))
                continue
            if problem := _several_values(text, override, sweeping=bool({"--multirun", "-m"} & set(arguments))):
                problems.append(problem)
                continue
            singles = _single_values(text, override)
            alone = len(overrides) == len(singles) == 1
            failure = (text, first_error) if alone and first_error else _first_failure(config, accepted, singles)
            if failure is None:
                accepted.append(singles[0])
            else:
                # Only a run's keys are known without composing it.
                problems.append(
                    _explain(failure[0], override, failure[1], lambda: _compose(config, accepted), config == "config")
                )
    if not problems and first_error is not None:
        return _of_swept_groups(overrides, first_error)
    return problems


def _of_swept_groups(overrides: list[str], error: Exception) -> list[Problem]:
    """What Hydra doesn't compose for a sweep over a group's options, though each of its jobs does compose.

    Its config for the sweep as a whole has none of those options. So what only they have isn't in that config, but it
    is in the jobs'.
    """
    parsed = [(text, OverridesParser.create().parse_override(text)) for text in overrides]
    groups = tuple(f"{one.key_or_group}." for _, one in parsed if one.is_sweep_override())
    what = "is a key of some of the group's options alone, and the group is swept"
    return [
        Problem(one.key_or_group, what, f"write ++{text.lstrip('+')}")
        for text, one in parsed
        if one.key_or_group.startswith(groups) and f"'{one.key_or_group}'" in str(error)
    ]


def _first_failure(config: str, accepted: list[str], singles: list[str]) -> tuple[str, Exception] | None:
    """The first value of an override that doesn't compose, and what Hydra says of it."""
    for single in singles:
        try:
            _compose(config, [*accepted, single])
        except Exception as error:  # Hydra lets through what its own code stumbles over
            return single, error
    return None


def _compose(config: str, overrides: list[str]) -> DictConfig:
    return compose(config, overrides=overrides, return_hydra_config=True)


# Sweeps whose values can be listed without a sweeper.
_LISTED = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def _several_values(text: str, override: Override, *, sweeping: bool) -> Problem | None:
    """A Problem for several values where one is needed."""
    if not override.is_sweep_override():
        return None
    if sweeping:
        return None
    if override.value_type not in _LISTED:
        return Problem(text, "is an interval or a pattern, not a value", "give it one value")
    fix = "for a list write key=[a,b], for a text key='\"a,b\"', for one run each add --multirun"
    return Problem(text, "gives several values", fix)


def _single_values(text: str, override: Override) -> list[str]:
    """The override once for each value of its sweep, or itself when it is none."""
    if not override.is_sweep_override() or override.value_type not in _LISTED:
        return [text]
    prefix = text.split("=", 1)[0]
    return [f"{prefix}={value}" for value in override.sweep_string_iterator()]


def _grammar_problem(text: str, error: HydraException) -> Problem:
    if "=" not in text and not text.startswith("~"):
        if text in COMMANDS:
            return Problem(text, "is a command, and a command stands first", f"write it ahead of all else: {text} ...")
        return Problem(text, f"is neither a command nor key=value{nearest(text, COMMANDS)}", "write key=value")
    return Problem(text, f"can't be read: {first_line(error)}", "quote the value: key='\"...\"'")


def _explain(
    text: str, override: Override, error: Exception, composed: Callable[[], DictConfig], is_run: bool
) -> Problem:
    key = override.key_or_group
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if plugin := missing_plugin(error, key):
        return plugin
    if isinstance(error, MissingConfigException) and error.options is not None:
        value = text.split("=", 1)[1]
        options = list(error.options)
        if is_run and (meant := meant_option(key, value)):
            return Problem(key, f"there is no option '{value}'", f"write {meant}")
        return Problem(key, f"there is no option '{value}'{nearest(value, options)}", f"one of: {', '.join(options)}")
    if isinstance(cause, ValidationError):
        return Problem(key, _type_message(cause), "give it a value of that type")
    if "is already at" in str(error) or "Could not append" in str(error):
        plain = text.lstrip("+")
        return Problem(
            text, "is in the config already", f"leave out the plus: {plain} (in a sweep of groups: ++{plain})"
        )
    if "Could not override" in str(error) or "No match in the defaults list" in str(error):
        return _unknown_key(key, text, composed, is_run)
    return Problem(text, " ".join(line.strip() for line in str(error).splitlines()[:2]))


def _type_message(cause: ValidationError) -> str:
    message = first_line(cause)
    match = re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", message)
    if match is None:
        return message
    names = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    return f"'{match[1]}' is not {names.get(match[2], match[2])}"


def _unknown_key(key: str, text: str, composed: Callable[[], DictConfig], is_run: bool = True) -> Problem:
    """The deepest part of `key` that exists, and what it holds."""
    first = key.replace("/", ".").split(".")[0]
    if is_run and has_unknown_key([text]):
        if fix := _meant_overrides(key, text, composed()):
            return Problem(key, "there is no such key", fix)
        fix = f"the config has: {', '.join(ROOT_KEYS)}"
        return Problem(key, f"there is no such key{nearest(first, ROOT_KEYS)}", fix)
    if is_run and (problem := set_elsewhere(key)):
        return problem
    config = composed()
    parent, _, last = key.rpartition(".")
    while parent and not isinstance(OmegaConf.select(config, parent), DictConfig):
        parent, _, last = parent.rpartition(".")
    holder = OmegaConf.select(config, parent) if parent else config
    names = sorted(str(name) for name in holder if name != "hydra")
    if last in names:  # a group of a finished run's config, to which no option belongs any more
        fix = f"change single keys: {key}.key=value"
        return Problem(key, f"'{text}' names another option, and the run has its own", fix)
    options = _options_with(key) if is_run and parent in (*GROUPS, "task.args") else []
    if is_run and not options and (fix := _meant_overrides(last, text, config)):
        return Problem(key, "there is no such key", fix)
    hint = "" if options else nearest(last, names)
    fix = f"{parent or 'the config'} has: {', '.join(names) or 'no key'}"
    if options:
        fix = f"choose an option that has it: {', '.join(options)}"
    if not hint and (when := _may_be_added(parent, of_an_option=bool(options))):
        fix += f". {when}, write +{text.lstrip('+')}"
    return Problem(key, f"there is no such key{hint}", fix)


def _meant_overrides(name: str, text: str, config: DictConfig) -> str:
    """Return the fix for a key that stands elsewhere, or has another name here; empty where none is known."""
    plain: Any = OmegaConf.to_container(run_of(config), resolve=False)
    value = text.partition("=")[2]
    overrides = [f"{key}={value}" for key in meant_keys(name, plain)]
    return f"write {' or '.join(overrides)}" if overrides else ""


def _may_be_added(parent: str, *, of_an_option: bool) -> str:
    """When a key that isn't there may be added to `parent`, in words; empty where it never may."""
    group, _, inside = parent.partition(".")
    if group == "loraplus":
        return "To add it" if inside else ""  # a rule, or a key of one
    if group in ("data", "task") and of_an_option:
        return ""  # the options list all that their functions take
    return "If it is a setting of the class behind it" if group in GROUPS and group not in CLOSED_GROUPS else ""


def _options_with(key: str) -> list[str]:
    """The options of a run's group whose YAML has `key`, as they are chosen: `data=jsonl`."""
    group, _, inside = key.partition(".")
    files = sorted((config_folder() / group).glob("*.yaml"))
    plain = {file.stem: OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files}
    return [f"{group}={option}" for option, values in plain.items() if select(values, inside)[0]]
