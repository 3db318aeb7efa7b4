"""The end of a sweep, however it came: the report of what is there, and what became of the jobs of this start."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from loraplus_hydra.report.formatting import count
from loraplus_hydra.report.read_sweep import SWEEP
from loraplus_hydra.sweep import job_status
from loraplus_hydra.sweep.plan import Sweep


def finish(sweep: Sweep) -> bool:
    """Make and show the report, and tell of the jobs that this start ran. Returns whether all of them are done.

    A sweep that never came to a job leaves nothing behind.
    """
    jobs = job_status.collect(sweep.start)
    job_status.end(sweep.start)
    if not jobs:
        _remove_empty(sweep)
        return True
    told = _report(sweep.folder)
    _tell(sweep, jobs, told or ())
    return told is not None and all(job.status in (job_status.DONE, job_status.SKIPPED) for job in jobs)


def _report(folder: Path) -> Collection[str] | None:
    """The jobs that the report names as having no result; None when it could not be made."""
    try:
        from loraplus_hydra.report.terminal import show
        from loraplus_hydra.report.write import write_report

        report = write_report(folder)
        print()
        show(report)
    except Exception as error:  # the jobs' own files are safe, whatever is wrong with this
        print(f"The report could not be made: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return {job.folder for job in report.unsuccessful}


def _tell(sweep: Sweep, jobs: list[job_status.Record], told: Collection[str]) -> None:
    numbers = Counter(job.status for job in jobs)
    words = (
        (job_status.DONE, "done"),
        (job_status.SKIPPED, "done before"),
        (job_status.FAILED, "failed"),
        (job_status.INTERRUPTED, "interrupted"),
        (job_status.RUNNING, "ended without a word"),
    )
    counts = ", ".join(f"{numbers[status]} {word}" for status, word in words if numbers[status])
    print(f"\n{count(len(jobs), 'job')}: {counts}. Everything lies in {_short(sweep.folder)}")
    for job in jobs:
        if job.status in (job_status.FAILED, job_status.RUNNING) and job.folder not in told:
            reason = job.text.strip().splitlines() or ["its process was killed"]
            print(f"  {job.folder}: {reason[0]}")
    if numbers[job_status.FAILED] + numbers[job_status.RUNNING] + numbers[job_status.INTERRUPTED]:
        print("The same command again runs what is missing or failed, and nothing else.")


def _remove_empty(sweep: Sweep) -> None:
    if not sweep.is_new or any(path.is_dir() for path in sweep.folder.iterdir()):
        return
    for name in (SWEEP, "multirun.yaml"):  # the second is Hydra's
        (sweep.folder / name).unlink(missing_ok=True)
    if not any(sweep.folder.iterdir()):
        sweep.folder.rmdir()


def _short(folder: Path) -> str:
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative
