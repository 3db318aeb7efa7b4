"""How the jobs of one start of a sweep ended, noted by the processes that ran them, whichever launcher started those.

A job done before has no new result.json, and a worker that was killed tells nobody; so each job leaves a small file in
the sweep's folder, which the start reads at its end and removes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.io.read import Unreadable, read_json

FOLDER = ".jobs"
RUNNING, DONE, SKIPPED, FAILED, INTERRUPTED = "running", "done", "skipped", "failed", "interrupted"


@dataclass(frozen=True)
class Start:
    """One start of a sweep, which locks the folder of its jobs' files until it ends."""

    folder: Path
    lock: ExitStack

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
    """Make and lock the folder for a new start's files, and remove the folders of starts that were killed."""
    for old in (sweep / FOLDER).glob("*"):
        with suppress(UserError, OSError), folder_lock(old) as locked:
            if locked:  # no process holds it; without locks nobody knows
                shutil.rmtree(old)
    folder = sweep / FOLDER / uuid.uuid4().hex[:12]
    folder.mkdir(parents=True)
    lock = ExitStack()
    lock.enter_context(folder_lock(folder))
    return Start(folder, lock)


def note(sweep: Path, start: str, record: Record) -> None:
    """Note how a job stands, in place of what was noted of it before."""
    folder = sweep / FOLDER / start
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{record.folder.replace(os.sep, '%')}.json", json.dumps(asdict(record)))


def collect(start: Start) -> list[Record]:
    """What was noted of the jobs of `start`, by name."""
    found = []
    for path in sorted(start.folder.glob("*.json")):
        with suppress(Unreadable, TypeError):
            found.append(Record(**read_json(path)))
    return found


def end(start: Start) -> None:
    """Remove the start's files and give up its lock."""
    shutil.rmtree(start.folder, ignore_errors=True)
    with suppress(OSError):  # not empty: another start is active
        start.folder.parent.rmdir()
    start.lock.close()
