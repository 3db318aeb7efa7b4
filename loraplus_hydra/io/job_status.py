"""Status files of a sweep's jobs, written by the processes that run them.

The files work with any launcher, and belong to one start of the sweep. A job that was done before writes no new
result.json, and a killed worker writes nothing. So each job writes a small status file in the sweep's folder. At its
end, the start reads and removes these files.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.folders import make_folder, remove_folder
from loraplus_hydra.io.locks import folder_lock, is_locked
from loraplus_hydra.io.read import Unreadable, read_json

FOLDER = ".jobs"
RUNNING, DONE, SKIPPED, FAILED, INTERRUPTED = "running", "done", "skipped", "failed", "interrupted"
WAITING, PRUNED = "waiting", "pruned"  # as in result.json


@dataclass(frozen=True)
class Start:
    """One start of a sweep, with the locked folder of its status files."""

    folder: Path
    lock: ExitStack

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class JobStatus:
    """The status of one job."""

    folder: str  # the folder's name inside the sweep's folder
    status: str
    text: str = ""  # the error of a failed job
    value: float | None = None  # the metric that the sweep compares
    overrides: Sequence[str] = ()


def begin(sweep: Path) -> Start:
    """Make and lock a folder for this start of the sweep. Remove the folders of killed starts."""
    for old in (sweep / FOLDER).glob("*"):
        with suppress(UserError, OSError), folder_lock(old) as locked:  # UserError if that start is active
            if locked:  # otherwise the file system has no locks, so it is unknown
                remove_folder(old)
    folder = sweep / FOLDER / uuid.uuid4().hex[:12]
    make_folder(folder)
    lock = ExitStack()
    lock.enter_context(folder_lock(folder))
    return Start(folder, lock)


def write(sweep: Path, start: str, status: JobStatus) -> None:
    """Write a job's status. It replaces the job's earlier status."""
    folder = sweep / FOLDER / start
    make_folder(folder)
    write_text(folder / f"{status.folder.replace(os.sep, '%')}.json", json.dumps(asdict(status)))


def read_all(sweep: Path, start: str) -> list[JobStatus]:
    """Return the status of each job of a start, sorted by the jobs' names."""
    statuses = []
    for path in sorted((sweep / FOLDER / start).glob("*.json")):
        with suppress(Unreadable, TypeError):
            statuses.append(JobStatus(**read_json(path)))
    return statuses


def read_active(sweep: Path) -> list[JobStatus] | None:
    """Return the status of each job of the starts in progress; None if no start is in progress."""
    active = [folder for folder in sorted((sweep / FOLDER).glob("*")) if is_locked(folder) is not False]
    return [status for folder in active for status in read_all(sweep, folder.name)] if active else None


def end(start: Start) -> None:
    """Remove the status files and release the lock."""
    remove_folder(start.folder)
    with suppress(OSError):  # it is not empty if another start is active
        start.folder.parent.rmdir()
    start.lock.close()
