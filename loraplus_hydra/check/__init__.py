"""Everything that is wrong with a config, at once, before any weight is loaded.

Each module here looks at one side of the config and returns Problems; none raises. What depends on the parts of a
config that are already known to be wrong is left out, so that one mistake is told once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.errors import ConfigErrors, Problem

if TYPE_CHECKING:
    from peft import PeftModel

    from loraplus_hydra.loraplus.plan import Plan
    from loraplus_hydra.tasks.examples import Examples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """A config without errors, and the parts of its dry run that a command can use again."""

    config: DictConfig
    model: PeftModel  # on the meta device
    plan: Plan  # of the model's parameter groups
    notes: tuple[str, ...] = ()  # on the rows, for the user


def check(config: DictConfig) -> Checked:
    """Check a composed `run` config. Raises ConfigErrors with every error in it."""
    return _check(config, with_data=True)


def check_without_data(config: DictConfig) -> Checked:
    """Check a config for commands that need no rows: errors of `data` are left out. Raises ConfigErrors."""
    return _check(config, with_data=False)


def stored_problems(config: DictConfig, groups: Iterable[str] | None = None) -> list[Problem]:
    """What is wrong with a run's stored config in `groups` (None: all), as far as it can be told without its rows.

    Its interpolations are resolved, so which of the `loraplus` keys are read can't be told any more.
    """
    _, problems = _of_single_values(config, OmegaConf.create())
    wanted = None if groups is None else set(groups)
    return _told_once([one for one in problems if wanted is None or one.key.split(".")[0] in wanted])


def _check(config: DictConfig, *, with_data: bool) -> Checked:
    from loraplus_hydra.check.dry_run import data_problems, load_data, plan_without_weights
    from loraplus_hydra.check.weights import checkpoint_problems, weights_problems

    plain, problems = _of_single_values(config, config)
    wrong = {problem.key.split(".")[0] for problem in problems}
    examples: Examples | None = None
    if "trainer" not in wrong:
        problems += checkpoint_problems(config)
    if not with_data:
        problems = [problem for problem in problems if problem.key.split(".")[0] != "data"]
    elif "model" not in wrong:
        problems += weights_problems(config.model)
        _warn_of_remote_code(plain)
        if not wrong & {"data", "task", "seed"}:
            try:
                examples = load_data(config)
            except ConfigErrors as errors:
                problems += errors.problems
                # The model is at the place where the tokenizer was not found.
                wrong |= {"model"} & {problem.key.removesuffix(".path") for problem in errors.problems}
    elif not wrong & {"data", "task", "seed"}:
        problems += data_problems(config)
    if not wrong & {"model", "adapter", "task", "optimizer", "scheduler", "loraplus"}:
        try:
            model, plan = plan_without_weights(config, examples)
        except ConfigErrors as errors:
            problems += errors.problems
    if problems:
        raise ConfigErrors(_told_once(problems))
    return Checked(config, model, plan, examples.notes if examples else ())


def _of_single_values(config: DictConfig, source: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """The config as plain containers, and what is wrong with its keys and values without rows or a model.

    `source` is where its interpolations stand, or empty.
    """
    from loraplus_hydra.check.classes import class_problems
    from loraplus_hydra.check.keys import read_config, unknown_keys
    from loraplus_hydra.check.machine import machine_problems
    from loraplus_hydra.check.values import value_problems
    from loraplus_hydra.check.weights import location_problems

    plain, problems = read_config(config)
    problems += unknown_keys(plain, source)
    problems += value_problems(plain)
    problems += class_problems(plain)
    problems += machine_problems(plain)
    problems += location_problems(plain.get("model", {}))
    return plain, problems


def _warn_of_remote_code(plain: dict[str, Any]) -> None:
    model = plain.get("model", {})
    if isinstance(model, dict) and model.get("trust_remote_code") is True:
        log.warning(
            "Warning: model.trust_remote_code is true, so Python that comes with %s is run as it is.", model.get("path")
        )


def _told_once(problems: list[Problem]) -> list[Problem]:
    """Without repetitions: a wrong `loraplus.ratio` is wrong again in each rule that refers to it."""
    from loraplus_hydra.check.keys import NOT_SET
    from loraplus_hydra.config.schema import value_ranges

    keys = {problem.key for problem in problems}
    referred = keys & {"loraplus.ratio", "loraplus.lr_embedding", "loraplus.lr_A", "loraplus.lr_B", "optimizer.lr"}
    kept = [problem for problem in problems if not (referred and problem.key.startswith("loraplus.rules."))]
    told: dict[tuple[str, str], Problem] = {}
    # What is told first says all of a value out of its range or not set: a signature misses it, too.
    once = value_ranges().keys() | {problem.key for problem in problems if problem.what == NOT_SET}
    for problem in kept:
        told.setdefault((problem.key, "" if problem.key in once else problem.what), problem)
    return list(told.values())
