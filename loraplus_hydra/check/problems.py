"""All checks of a config, in order.

Each module of this package checks one part of the config and returns Problems. If a part has errors, checks that depend
on it are skipped, because they would report the same errors again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from omegaconf import DictConfig

from loraplus_hydra.check import Checked
from loraplus_hydra.check.classes import class_problems
from loraplus_hydra.check.dry_run import check_other_text, data_problems, load_data, plan_without_weights
from loraplus_hydra.check.keys import NOT_SET, read_config, unknown_keys
from loraplus_hydra.check.machine import machine_problems
from loraplus_hydra.check.trial import trial_problems
from loraplus_hydra.check.values import value_problems
from loraplus_hydra.check.weights import location_problems, open_named_checkpoint, weights_problems
from loraplus_hydra.config.schema import value_ranges
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import interrupts

T = TypeVar("T")
# Keys that the presets' rules use. A wrong value would be reported again for each rule.
_IN_RULES = (
    *(f"loraplus.{key}" for key in ("ratio", "lr_embedding", "lr_head", "lr_A", "lr_B")),
    "optimizer.lr",
)

log = logging.getLogger(__name__)


def check_config(config: DictConfig, *, with_data: bool) -> Checked:
    """Run all checks. Without data, the checks of the rows and of the model's weights are skipped.

    Raises ConfigErrors.
    """
    problems = problems_of_values(config, config)
    if not with_data:
        problems = [problem for problem in problems if problem.key.split(".")[0] != "data"]
    wrong = {problem.key.split(".")[0] for problem in problems}
    checkpoint = examples = planned = None
    if "trainer" not in wrong:
        checkpoint = _collect(problems, open_named_checkpoint, config)
    if with_data and "model" not in wrong:
        problems += weights_problems(config.model)
        _warn_of_remote_code(config)
        if not wrong & {"data", "task", "seed"}:
            of_data: list[Problem] = []
            examples = _collect(of_data, load_data, config)
            problems += of_data
            if examples is not None and "forgetting" not in wrong:
                _collect(problems, check_other_text, config)
            if any(problem.key == "model.path" for problem in of_data):
                wrong.add("model")  # the model can't be found either
    elif with_data and not wrong & {"data", "task", "seed"}:
        problems += data_problems(config)
    if not wrong & {"model", "adapter", "task", "optimizer", "scheduler", "loraplus"}:
        planned = _collect(problems, plan_without_weights, config, examples)
    if not problems and examples is not None:
        problems += trial_problems(config, examples)
    if problems or planned is None:
        raise ConfigErrors(deduplicate(problems))
    return Checked(config, *planned, checkpoint, examples.notes if examples else ())


def problems_of_values(config: DictConfig, source: DictConfig) -> list[Problem]:
    """Return the errors of keys and values. No rows and no model are needed.

    `source` is the config with its interpolations, or empty if they are resolved.
    """
    plain, problems = read_config(config)
    problems += unknown_keys(plain, source)
    for check in (value_problems, class_problems, machine_problems):
        interrupts.stop_if_asked()
        problems += check(plain)
    return problems + location_problems(plain.get("model", {}))


def deduplicate(problems: list[Problem]) -> list[Problem]:
    """Return the problems without repetitions."""
    keys = {problem.key for problem in problems}
    if keys & set(_IN_RULES):
        problems = [problem for problem in problems if not problem.key.startswith("loraplus.rules.")]
    # If a value is out of range or not set, the signature's error about the same key adds nothing.
    once = value_ranges().keys() | {problem.key for problem in problems if problem.what == NOT_SET}
    kept: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        kept.setdefault((problem.key, "" if problem.key in once else problem.what), problem)
    return list(kept.values())


def _collect(problems: list[Problem], check: Callable[..., T], *arguments: Any) -> T | None:
    """Return the check's result, or None after adding its errors to `problems`."""
    interrupts.stop_if_asked()
    try:
        return check(*arguments)
    except ConfigErrors as errors:
        problems += errors.problems
        return None


def _warn_of_remote_code(config: DictConfig) -> None:
    if config.model.trust_remote_code:
        what = "Warning: model.trust_remote_code is true, so Python code in %s is run without checks."
        log.warning(what, config.model.path)
