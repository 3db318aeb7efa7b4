"""The live report: it follows a sweep's processes, hinders none, and ends with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts, job_status
from loraplus_hydra.io.job_status import DONE, RUNNING, JobStatus
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.report import watch, write
from loraplus_hydra.report.read_sweep import read_sweep
from tests.conftest import Finished
from tests.support.finished_sweeps import write_job, write_sweep

LIVE = "location.reload()"
Steps = Callable[..., None]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Return a function that sets what happens in each pause of the watch. Figures are left out, for speed."""
    monkeypatch.setattr(write, "_draw", lambda *_, **__: iter(()))
    monkeypatch.setattr(watch, "_EVERY", 0.0)
    monkeypatch.setattr(watch, "_REST", 0.0)

    def set_steps(*actions: Callable[[], object]) -> None:
        left = iter(actions)

        def pause(seconds: float) -> None:
            action = next(left, None)
            assert action is not None, "the watch goes on after the last step"
            action()
            interrupts.stop_if_asked()

        monkeypatch.setattr(watch, "_pause", pause)

    # A shell's background jobs, in which the tests may run, ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield set_steps
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of three jobs: one is done, one runs at step 40, and one has not begun."""
    folder = write_sweep(tmp_path / "sweep", command="python -m loraplus_hydra -m loraplus.ratio=1,4,16", jobs=3)
    write_job(folder / "done", {"loraplus.ratio": 1}, 3.7)
    running = write_job(folder / "running", {"loraplus.ratio": 4}, None, curve=[(0, 5.25), (40, 4.125)])
    (running / "result.json").unlink()
    return folder


@pytest.fixture
def start(sweep: Path) -> Iterator[job_status.Start]:
    start = job_status.begin(sweep)
    job_status.write(sweep, start.name, JobStatus("done", DONE))
    job_status.write(sweep, start.name, JobStatus("running", RUNNING))
    yield start
    start.lock.close()


def _nothing() -> None:
    pass


def page(sweep: Path) -> str:
    return (sweep / "report.html").read_text()


def test_page_follows_the_jobs_until_the_sweep_ends(sweep: Path, start: job_status.Start, steps: Steps) -> None:
    def look() -> None:
        assert LIVE in page(sweep)
        assert "3 jobs: 1 with a result, 1 running, 1 not begun" in page(sweep)
        assert "step 40 of 200, eval_loss 4.1250" in page(sweep)
        assert "without a result</h2>" not in page(sweep)
        assert not (sweep / "results.csv").exists()
        with folder_lock(sweep, patience=0.0), folder_lock(sweep / "running", patience=0.0):
            pass  # neither the sweep's own report nor a job would wait
        job_status.end(job_status.begin(sweep))  # nor would another start

    def finish_job() -> None:
        (sweep / "running").rename(sweep / "old")
        write_job(sweep / "running", {"loraplus.ratio": 4}, 3.5)
        (sweep / "old" / "result.json").write_text('{"status": "pruned", "steps": 40}')
        job_status.write(sweep, start.name, JobStatus("running", DONE))

    def end() -> None:
        assert "Best: ratio 4" in page(sweep)
        assert LIVE in page(sweep)
        job_status.end(start)

    steps(look, finish_job, end)
    results = watch.watch(sweep)
    assert not results.sweep.is_active
    assert LIVE not in page(sweep)
    assert "Best: ratio 4" in page(sweep)
    assert (sweep / "results.csv").exists()


def test_unchanged_files_are_not_written_again(
    sweep: Path, start: job_status.Start, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(watch, "write_live_page", lambda _, results: written.append(results))
    metrics = sweep / "running" / "metrics.jsonl"
    steps(
        _nothing,
        _nothing,
        lambda: metrics.write_text(metrics.read_text() + '{"step": 60, "eval_loss": 4.0}\n'),
        _nothing,
        lambda: job_status.end(start),
    )
    watch.watch(sweep)
    assert [job.progress for results in written for job in results.sweep.in_progress] == [
        "step 40 of 200, eval_loss 4.1250",
        "step 60 of 200, eval_loss 4.0000",
    ]


def test_pages_leave_most_of_the_time_to_the_jobs(
    sweep: Path, start: job_status.Start, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_EVERY", 1000.0)
    metrics = sweep / "running" / "metrics.jsonl"
    written = []
    monkeypatch.setattr(watch, "write_live_page", lambda *_: written.append(1))
    steps(lambda: metrics.write_text(""), lambda: metrics.unlink(), lambda: job_status.end(start))
    watch.watch(sweep)
    assert len(written) == 1


def test_ctrl_c_leaves_a_page_that_does_not_load_itself_again(
    sweep: Path, start: job_status.Start, steps: Steps, cli: Callable[..., Finished]
) -> None:
    steps(lambda: os.kill(os.getpid(), signal.SIGINT))
    finished = cli("report", str(sweep), "watch=true")
    assert finished.status == 130
    assert "the report is written once more" in finished.err
    assert "Traceback" not in finished.err
    assert "3 jobs: 1 with a result, 1 running, 1 not begun" in finished.out
    assert LIVE not in page(sweep)
    assert "1 job in progress" in page(sweep)


@pytest.mark.parametrize("is_killed", [True, False])
def test_nothing_runs_and_the_watch_is_an_ordinary_report(
    sweep: Path, start: job_status.Start, steps: Steps, cli: Callable[..., Finished], is_killed: bool
) -> None:
    if is_killed:
        start.lock.close()  # as the operating system does for a killed process
    else:
        job_status.end(start)
    steps()
    finished = cli("report", str(sweep), "watch=true")
    assert finished.status == 0
    assert "it was killed, or runs on another machine" in page(sweep)
    assert LIVE not in page(sweep)


def test_process_that_is_killed_ends_the_watch(
    sweep: Path, start: job_status.Start, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_UNCHANGED", -1.0)
    steps(start.lock.close)
    assert [job.status for job in watch.watch(sweep).sweep.unsuccessful] == ["unfinished"]


def test_runs_that_were_started_one_by_one_are_followed(sweep: Path, steps: Steps) -> None:
    with folder_lock(sweep / "running"):
        assert [job.folder for job in read_sweep(sweep).in_progress] == ["running"]
        steps(lambda: os.kill(os.getpid(), signal.SIGINT))
        with interrupts.kept_signals(deliver=False), pytest.raises(KeyboardInterrupt):
            watch.watch(sweep)
    steps()
    assert not watch.watch(sweep).sweep.in_progress


def test_sweep_without_a_job_is_waited_for(tmp_path: Path, steps: Steps) -> None:
    write_sweep(tmp_path)
    start = job_status.begin(tmp_path)
    steps(_nothing, lambda: job_status.end(start))
    with pytest.raises(UserError, match="has no job"):
        watch.watch(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_wrong_use_is_an_error(tmp_path: Path, cli: Callable[..., Finished]) -> None:
    finished = cli("report", str(tmp_path / "gone"), "watch=true")
    assert finished.status == 1
    assert "there is no folder" in finished.err
    finished = cli("report", str(tmp_path), "watch=often")
    assert finished.status == 1
    assert "watch" in finished.err
    assert "Traceback" not in finished.err
    assert list(tmp_path.iterdir()) == []


def test_hostile_status_files_are_no_jobs(sweep: Path, start: job_status.Start) -> None:
    for place, text in enumerate(('{"folder": ["a"], "status": {}}', "[" * 1000, '{"status": "running"}', "")):
        (start.folder / f"{place}.json").write_text(text)
    assert [job.folder for job in read_sweep(sweep).in_progress] == ["running"]
