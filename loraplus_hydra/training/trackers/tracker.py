"""The base class of trackers, and the description of a run for trackers."""

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
    """The description of a run that its tracker gets at the start."""

    folder: Path  # the run's folder; a tracker may store files for a resume in it
    name: str
    group: str | None  # name of the sweep, if the run is one of its jobs
    config: Mapping[str, Any]  # the whole config, nested
    started_in: Path  # the folder in which the command was given; relative paths start there
    resumed_at: int | None  # step from which the run resumes (0: from the beginning); None for a new run


class Tracker(ABC):
    """A tracker of one run. The keys of the config's `logger` group are its arguments.

    Only the run's first process has a tracker. If the tracker raises an error, the run warns once and continues without
    it.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # modules that must be installed
    extra: ClassVar[str] = ""  # this package's extra that installs them

    @classmethod
    def problems(cls, **arguments: Any) -> list[str]:  # noqa: ARG003 - for subclasses
        """Return the reasons why the tracker can't be used here with these arguments.

        Called before the run starts.
        """
        missing = [name for name in cls.needs if importlib.util.find_spec(name) is None]
        if not missing:
            return []
        fix = f": pip install 'loraplus_hydra[{cls.extra}]', or use logger=none" if cls.extra else ""
        return [f"{cls.__name__} needs {', '.join(missing)}, which isn't installed{fix}"]

    @abstractmethod
    def start(self, run: TrackedRun) -> None:
        """Start to track a run, or resume it."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of one line of metrics.jsonl.

        Names are, for example, `loss`, `lr/groupA` and `norms/groupB/update`.
        """

    @abstractmethod
    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Close the run, also if it failed, or if `start` or `log` raised an error.

        `status` is that of result.json (ok, failed, interrupted, waiting). `metrics` are the final metrics. A failed
        run has only some of them.
        """


def read_id(file: Path) -> str | None:
    """Return the tracker's ID of the run, stored in `file`, or None."""
    return read_or("", read_text, file).strip() or None
