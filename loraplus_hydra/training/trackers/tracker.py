"""The base class of trackers, and the description of a run that they get."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loraplus_hydra.io.read import read_or, read_text


@dataclass(frozen=True)
class TrackedRun:
    """A run as its tracker sees it at the start."""

    folder: Path  # the run's own; a tracker may store there what it needs for a resume
    name: str
    group: str | None  # name of the sweep, if the run is one of its jobs
    config: Mapping[str, Any]  # the whole config, nested
    started_in: Path  # the folder in which the command was given; relative paths start there
    resumed_at: int | None  # step that the run resumes from (0: it starts over); None for a new run


class Tracker(ABC):
    """A tracker of one run. The keys of the config's `logger` group are its arguments.

    Only the run's first process makes one. When it raises an error, the run warns once and continues without it.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # modules that have to be installed
    extra: ClassVar[str] = ""  # this package's extra that installs them

    @classmethod
    def problems(cls, **arguments: Any) -> list[str]:  # noqa: ARG003 - for subclasses
        """Return the reasons why the tracker can't be used here with these arguments.

        Called before the run starts.
        """
        missing = [name for name in cls.needs if importlib.util.find_spec(name) is None]
        if not missing:
            return []
        fix = f": pip install 'loraplus_hydra[{cls.extra}]', or leave it out with logger=none" if cls.extra else ""
        return [f"{cls.__name__} needs {', '.join(missing)}, which isn't installed{fix}"]

    @abstractmethod
    def start(self, run: TrackedRun) -> None:
        """Start to track a run, or resume it."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of one line of metrics.jsonl.

        Their names are such as `loss`, `lr/groupA` and `norms/groupB/update`.
        """

    @abstractmethod
    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Close the run, also after it failed, or after `start` or `log` raised an error.

        `status` is the one in result.json (ok, failed, interrupted, pruned). `metrics` are the final ones; a run that
        failed has those it reached.
        """


def read_id(file: Path) -> str | None:
    """Return the run's ID at its tracker, stored in `file`; None when there is none."""
    return read_or("", read_text, file).strip() or None
