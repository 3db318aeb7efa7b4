"""A live report: the page of a sweep, written again while processes run its jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from loraplus_hydra.io import interrupts, job_status, run_folder
from loraplus_hydra.io.text import visible
from loraplus_hydra.report import summary
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.write import PAGE, read_results, write_live_page, write_report

_EVERY = 5.0  # minimum number of seconds between two pages
_REST = 4  # a page is followed by this multiple of its CPU time, because the jobs need the CPU
_UNCHANGED = 30.0  # seconds without a change, after which it is asked if the processes still live
_LOOK, _TICK = 1.0, 0.1  # seconds between two looks at the files, and until a signal is noticed
_OF_SWEEP = (run_folder.SWEEP, run_folder.HALVING, run_folder.TUNE)
_OF_JOB = (run_folder.RESULT, run_folder.CONFIG, run_folder.METRICS, run_folder.PARAM_GROUPS)

State = dict[Path, tuple[int, int]]  # size and time of each file


def watch(folder: Path) -> SweepResults:
    """Write the page whenever files have changed, until no process runs a job; then write the report.

    A signal ends the watch, too, after the report. Returns the results in the report. Raises UserError if there is no
    such folder, or no job in it.
    """
    try:
        with interrupts.notice("the report is written once more"):
            _follow(folder)
    except KeyboardInterrupt:
        with interrupts.answered():
            write_report(folder)
        raise
    return write_report(folder)


def _follow(folder: Path) -> None:
    seen: State | None = None
    said, due, asked = "", 0.0, 0.0
    while True:
        state, now = _state(folder), time.monotonic()
        # A start of the sweep that begins or ends is shown at once
        starts_differ = seen is None or _starts(state) != _starts(seen)
        if starts_differ or (state != seen and now >= due) or now > asked + _UNCHANGED:
            began, results = time.process_time(), read_results(folder)
            if not results.sweep.is_active:
                return
            said = _say(results, said)
            if state != seen and results.sweep.jobs:
                write_live_page(folder, results)
            seen, asked = state, time.monotonic()
            due = asked + max(_EVERY, _REST * (time.process_time() - began))
        _pause(_LOOK)


def _state(folder: Path) -> State:
    """Return the size and time of each file that the report reads."""
    files = [folder / name for name in _OF_SWEEP]
    files += (folder / job_status.FOLDER).glob("*/*.json")
    files += [job / name for job in folder.glob("*/") for name in _OF_JOB]
    return dict(_found(files))


def _found(files: list[Path]) -> Iterator[tuple[Path, tuple[int, int]]]:
    for path in files:
        try:
            found = path.lstat()
        except OSError:
            continue
        yield path, (found.st_size, found.st_mtime_ns)


def _starts(state: State) -> set[Path]:
    return {path.parent for path in state if path.parent.parent.name == job_status.FOLDER}


def _say(results: SweepResults, said: str) -> str:
    """Print the number of jobs in each state, if it has changed. Return it."""
    text = summary.overview(results.sweep)
    if not said:
        print(visible(f"Watching; Ctrl-C ends it. The live page: {results.sweep.folder / PAGE}"), flush=True)
    if text != said:
        print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)
    return text


def _pause(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        interrupts.stop_if_asked()
        time.sleep(_TICK)  # a signal that only sets a flag doesn't end a sleep
