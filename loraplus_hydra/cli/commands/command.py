"""The type of a command, and of the job that a command leaves for the run after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig

from loraplus_hydra.check import Checked
from loraplus_hydra.io.checkpoints import ResumePoint


@dataclass(frozen=True)
class Job:
    """A checked run, and the checkpoint from which it resumes."""

    checked: Checked
    point: ResumePoint | None = None


@dataclass(frozen=True)
class Command:
    """A first word of the command line. `main` takes the composed config and the command's own flags.

    `main` runs before Hydra makes a folder. It returns a Job that Hydra is to run, or None when all is done.
    """

    name: str
    summary: str  # for --help
    main: Callable[[DictConfig, frozenset[str]], Job | None]
    usage: str = ""  # the words after the name, for --help
    config: str = "config"  # the YAML that it composes: `config` is a run
    positional: str | None = None  # the key that a bare word after the name sets
    flags: tuple[str, ...] = ()  # `--name` words of its own
    verbatim: tuple[str, ...] = ()  # keys whose value is any text, taken as it is typed
    changes: tuple[str, ...] = ()  # groups of the stored run's config that its overrides change: data.eval=...
