"""The types of a command and of the job that a command prepares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from omegaconf import DictConfig

from loraplus_hydra.check import Checked
from loraplus_hydra.config.types import describe, field_types, mismatch
from loraplus_hydra.errors import Problem
from loraplus_hydra.io.checkpoints import ResumePoint


@dataclass(frozen=True)
class Job:
    """A run for Hydra to start: its checked config, and the checkpoint to resume from."""

    checked: Checked
    point: ResumePoint | None = None


@dataclass(frozen=True)
class Command:
    """A command, the first word of the command line.

    `main` gets the composed config and the command's own flags, and runs before Hydra makes a folder. It returns a Job
    for Hydra to start, or None if nothing is left to do.
    """

    name: str
    summary: str  # for --help
    main: Callable[[DictConfig, frozenset[str]], Job | None]
    usage: str = ""  # the words after the name, for --help
    search: str | None = None  # the option of hparams_search that the command runs
    config: str = "config"  # the YAML file that is composed; `config` is for a run
    positional: str | None = None  # the key that is set by a word without `=` after the name
    flags: tuple[str, ...] = ()  # the command's own `--name` words
    verbatim: tuple[str, ...] = ()  # keys whose value is any text, used exactly as typed
    # Groups of the stored run's config that the command's overrides change: data.eval=...
    changes: tuple[str, ...] = ()


def range_problems(config: DictConfig, schema: type) -> Iterator[Problem]:
    """Yield a Problem for each key of a command's config that is out of its schema's range."""
    for key, (annotation, limits) in field_types(schema).items():
        if limits and (why := mismatch(config[key], annotation, limits)):
            yield Problem(key, f"{config[key]} {why}", f"it must be {describe(annotation, limits)}")
