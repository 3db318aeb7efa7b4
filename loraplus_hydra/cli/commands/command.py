"""The types of a command and of the job that a command prepares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig

from loraplus_hydra.check import Checked
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
    config: str = "config"  # the YAML file that is composed; `config` is for a run
    positional: str | None = None  # the key that is set by a word without `=` after the name
    flags: tuple[str, ...] = ()  # the command's own `--name` words
    verbatim: tuple[str, ...] = ()  # keys whose value is any text, used exactly as typed
    # Groups of the stored run's config that the command's overrides change: data.eval=...
    changes: tuple[str, ...] = ()
