"""The end of a sweep: its report, and a summary of its jobs."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from loraplus_hydra.io import job_status
from loraplus_hydra.io.files import remove
from loraplus_hydra.io.job_status import DONE, FAILED, INTERRUPTED, PRUNED, RUNNING, SKIPPED, WAITING, JobStatus
from loraplus_hydra.io.read import Unreadable
from loraplus_hydra.io.run_folder import SWEEP
from loraplus_hydra.io.text import presentable
from loraplus_hydra.report import terminal, write
from loraplus_hydra.report.formatting import count
from loraplus_hydra.sweep.plan import Sweep, write_left

_WORDS = {
    DONE: "done",
    SKIPPED: "done before",
    PRUNED: "pruned",
    WAITING: "waiting at a rung",
    FAILED: "failed",
    INTERRUPTED: "interrupted",
    RUNNING: "killed",  # its process ended before it wrote another status
}


def finish(sweep: Sweep) -> bool:
    """Write and show the report, and print a summary of the jobs that ran this time.

    Returns True if all jobs are done or pruned. If no job ran, a folder that was made for them is removed.
    """
    jobs = job_status.read_all(sweep.folder, sweep.start.name)
    job_status.end(sweep.start)
    if not jobs:
        _remove_empty(sweep)
        return True
    left = _not_begun(sweep, jobs)
    if left:
        with suppress(OSError, Unreadable):  # the report has the error in the file
            write_left(sweep, left)
    reported = _report(sweep.folder)
    _print_summary(sweep, jobs, reported or (), len(left))
    return reported is not None and not left and all(job.status in (DONE, SKIPPED, PRUNED) for job in jobs)


def _report(folder: Path) -> Collection[str] | None:
    """Write and show the report.

    Returns the jobs that the report lists without a result; None if the report failed.
    """
    try:
        results = write.write_report(folder)
        print()
        terminal.show(results)
    # Any error, because the summary of the jobs must follow, and the jobs' own files are complete
    except Exception as error:
        print(f"The report could not be written: {type(error).__name__}: {presentable(str(error))}", file=sys.stderr)
        return None
    return {job.folder for job in results.sweep.unsuccessful}


def _not_begun(sweep: Sweep, jobs: list[JobStatus]) -> list[tuple[str, ...]]:
    """Return the overrides of the jobs that this start has not begun."""
    return [overrides for overrides in sweep.jobs if not any(set(overrides) <= set(job.overrides) for job in jobs)]


def _print_summary(sweep: Sweep, jobs: list[JobStatus], reported: Collection[str], left: int) -> None:
    numbers = Counter(job.status for job in jobs)
    counts = ", ".join(f"{numbers[status]} {word}" for status, word in _WORDS.items() if numbers[status])
    run = f"{len(jobs)} of {count(len(jobs) + left, 'job')} run" if left else count(len(jobs), "job")
    print(f"\n{run}: {counts}. Everything is in {_relative(sweep.folder)}")
    for job in jobs:
        if job.status in (FAILED, RUNNING) and job.folder not in reported:
            reason = job.text.strip().splitlines() or ["its process was killed"]
            print(presentable(f"  {job.folder}: {reason[0]}"))
    if numbers[FAILED] + numbers[RUNNING] + numbers[INTERRUPTED] + numbers[WAITING] + left:
        print("The same command runs only the jobs that are missing or failed.")


def _remove_empty(sweep: Sweep) -> None:
    if not sweep.is_new or any(path.is_dir() for path in sweep.folder.iterdir()):
        return
    for name in (SWEEP, "multirun.yaml"):  # Hydra writes the second
        remove(sweep.folder / name)
    if not any(sweep.folder.iterdir()):
        sweep.folder.rmdir()


def _relative(folder: Path) -> str:
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative
