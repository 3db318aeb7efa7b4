"""What a tracker is: a class with `start`, `log` and `finish`; one of your own derives from `Tracker`."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it starts."""

    folder: Path  # the run's own; what the tracker has to remember for a resume may lie there
    name: str
    group: str | None  # the sweep's name, for a job of one
    config: Mapping[str, Any]  # the whole config, nested
    started_in: Path  # where the command was given, and relative paths begin
    resumed_at: int | None  # the step that the run goes on from (0: from its beginning); None for a new run


class Tracker(ABC):
    """Shows the numbers of one run. It is made from the config's `logger` group, whose keys are its arguments.

    Only the run's first process makes one. What it raises is told once as a warning, and the run goes on without it.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # modules that have to be installed
    extra: ClassVar[str] = ""  # this package's extra that installs them

    @classmethod
    def problems(cls, **arguments: Any) -> list[str]:  # noqa: ARG003 - for those that depend on them
        """Why it can't be used here with these arguments: looked at before the run begins."""
        missing = [name for name in cls.needs if importlib.util.find_spec(name) is None]
        if not missing:
            return []
        fix = f": pip install 'loraplus_hydra[{cls.extra}]', or leave it out with logger=none" if cls.extra else ""
        return [f"{cls.__name__} needs {', '.join(missing)}, which isn't installed{fix}"]

    @abstractmethod
    def start(self, run: TrackedRun) -> None:
        """Begin to track a run, or go on with it."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a line of metrics.jsonl, by names such as `loss`, `lr/groupA` and `norms/groupB/update`."""

    @abstractmethod
    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """The end, also of a run that failed, and of one whose `start` or `log` raised.

        `status` is as in result.json (ok, failed, interrupted, pruned); `metrics` are those of the end, as far as the
        run has come.
        """


def remembered(file: Path) -> str | None:
    """A line of text that was kept in `file`; None when there is none."""
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
