"""How the jobs of one start of a sweep ended, noted by the processes that ran them, whichever launcher started those.

A job done before has no new result.json, and a worker that was killed tells nobody; so each job leaves a small file in
the sweep's folder, which the start reads at its end and removes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loraplus_hydra.io.files import write_text

FOLDER = ".jobs"
RUNNING, DONE, SKIPPED, FAILED, INTERRUPTED = "running", "done", "skipped", "failed", "interrupted"


@dataclass(frozen=True)
class Start:
    """One start of a sweep. It holds a lock of the operating system's, so that what a killed one leaves is known."""

    folder: Path
    handle: int

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Record:
    """A job of this start."""

    folder: str  # its name inside the sweep's folder
    status: str
    text: str = ""  # its error
    value: float | None = None  # the metric that the sweep compares


def begin(sweep: Path) -> Start:
    """A place for the notes of a new start; those of starts that were killed are removed."""
    for old in (sweep / FOLDER).glob("*"):
        with suppress(OSError):  # a file system without locks, or a start at work
            handle = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
            finally:
                os.close(handle)
    folder = sweep / FOLDER / uuid.uuid4().hex[:12]
    folder.mkdir(parents=True)
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Start(folder, handle)


def note(sweep: Path, start: str, record: Record) -> None:
    """Note how a job stands, in place of what was noted of it before."""
    folder = sweep / FOLDER / start
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{record.folder.replace(os.sep, '%')}.json", json.dumps(asdict(record)))


def collect(start: Start) -> list[Record]:
    """What was noted of the jobs of `start`, by name."""
    found = []
    for path in sorted(start.folder.glob("*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def end(start: Start) -> None:
    """Remove the notes."""
    shutil.rmtree(start.folder, ignore_errors=True)
    with suppress(OSError):
        start.folder.parent.rmdir()
    with suppress(OSError):
        os.close(start.handle)
