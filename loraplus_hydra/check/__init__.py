"""All errors of a config in one list, before any weights are loaded.

Importing this package is cheap: torch and transformers are imported when a config is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.errors import Problem
from loraplus_hydra.io.checkpoints import Checkpoint
from loraplus_hydra.loraplus.plan import Plan

if TYPE_CHECKING:
    from peft import PeftModel  # importing it loads torch


@dataclass(frozen=True)
class Checked:
    """A config without errors, and the parts of its dry run that a command can use again."""

    config: DictConfig
    model: PeftModel  # with its adapter, on the meta device
    plan: Plan  # of the model's parameter groups
    checkpoint: Checkpoint | None = None  # the one that the config names
    notes: tuple[str, ...] = ()  # on the rows, for the user


def check(config: DictConfig, *, with_data: bool = True) -> Checked:
    """Check a composed `run` config. Raises ConfigErrors with every error in it.

    Commands that need no rows use `with_data=False`; errors of `data` are then ignored.
    """
    from loraplus_hydra.check.problems import check_config

    return check_config(config, with_data=with_data)


def stored_problems(config: DictConfig, groups: Iterable[str] | None = None) -> list[Problem]:
    """Return the errors of a stored run's config in `groups`; None means all groups.

    Only errors that can be found without rows and model are returned. Unused keys of `loraplus` are not found, because
    a stored config's interpolations are already resolved.
    """
    from loraplus_hydra.check.problems import deduplicate, problems_of_values

    problems = problems_of_values(config, OmegaConf.create())
    wanted = None if groups is None else set(groups)
    return deduplicate([one for one in problems if wanted is None or one.key.split(".")[0] in wanted])
