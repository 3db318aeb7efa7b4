"""A halved sweep: jobs stop at rungs, leave or resume, and a search that was stopped comes to the same decisions."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import DictConfig

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.interrupts import Interrupted
from loraplus_hydra.runs import job
from loraplus_hydra.sweep import finish as sweep_end
from loraplus_hydra.training.hf_trainer import rung
from tests.conftest import Finished
from tests.support.forking import differences
from tests.support.processes import in_own_session

Cli = Callable[..., Finished]
SECONDS = 600  # no wait is longer


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """The overrides of a halved grid of three candidates with 24 steps: rungs at 6 (two stay) and 12 (one stays)."""
    return ["hparams_search=halving", *tiny_run, "trainer.max_steps=24", "data.eval_fraction=0.5", RATIOS]


RATIOS = "loraplus.ratio=1,8,64"


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no report, which takes longer than a tiny sweep."""
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())


def the_sweep(place: Path) -> Path:
    """Return the folder of the only sweep below `place`."""
    (folder,) = (place / "outputs" / "sweeps").iterdir()
    return folder


def results(sweep: Path) -> dict[str, dict[str, Any]]:
    """Return each job's result, by the name of its folder without the hash."""
    return {path.parent.name.rpartition("_")[0]: json.loads(path.read_text()) for path in sweep.glob("*/result.json")}


def decisions(sweep: Path) -> dict[str, Any]:
    return json.loads((sweep / "halving.json").read_text())


def test_stopped_search_resumes_and_its_winner_is_the_unbroken_run(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_losses = rung._row_losses
    begun: list[int] = []

    def stopped_in_the_second(trainer: Any, share: float) -> Any:
        begun.append(trainer.state.global_step)
        if len(begun) == 2:
            raise Interrupted(signal.SIGINT)  # its checkpoint exists, but its losses don't
        return row_losses(trainer, share)

    with monkeypatch.context() as patch:
        patch.setattr(rung, "_row_losses", stopped_in_the_second)
        patch.setattr(sweep_end, "_report", lambda _: ())
        assert cli(*words).status == 130
    sweep = the_sweep(tmp_path)
    assert {name: (one["status"], one["steps"]) for name, one in results(sweep).items()} == {
        "ratio-1": ("waiting", 6),
        "ratio-8": ("interrupted", 6),
    }

    finished = cli(*words)
    assert finished.status == 0, finished.out[-3000:]
    decided = decisions(sweep)
    assert [(one["step"], one["keep"]) for one in decided["rungs"]][:2] == [(6, 2), (12, 1)]
    left = {one["name"]: at["step"] for at in decided["rungs"] for one in at["candidates"] if not one["stays"]}
    (winner,) = {"loraplus.ratio=1", "loraplus.ratio=8", "loraplus.ratio=64"} - left.keys()
    found = results(sweep)
    for ratio in ("1", "8", "64"):
        result, step = found[f"ratio-{ratio}"], left.get(f"loraplus.ratio={ratio}")
        assert (result["status"], result["steps"]) == (("ok", 24) if step is None else ("pruned", step))
        (folder,) = sweep.glob(f"ratio-{ratio}_*")
        assert (folder / "adapter").is_dir() == (step is None)
        assert bool(result["samples"]) == (step is None)
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == result["steps"]
    assert decided["job_steps"] == sum(result["steps"] for result in found.values())
    assert decided["job_steps"] <= 1.2 * (3 * 6 + 2 * 6 + 12)
    assert decided["of"] == 72
    assert "left at step" in finished.out
    assert "left at step" in (sweep / "report.html").read_text()
    assert f"Successive halving: {decided['job_steps']} of the grid's 72 steps were taken" in finished.out
    assert "3 jobs: 1 done, 2 pruned" in finished.out

    alone = [word for word in words if not word.startswith(("hparams_search", "loraplus.ratio"))]
    assert cli(*alone, winner, "hydra.run.dir=unbroken").status == 0
    (best,) = sweep.glob(f"{winner.replace('loraplus.ratio=', 'ratio-')}_*")
    assert differences(best, tmp_path / "unbroken") == []

    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    (sweep / "halving.json").write_text("damaged")
    again = cli(*words)
    assert "3 jobs: 1 done before, 2 pruned" in again.out
    assert "Resuming" not in again.out
    assert decisions(sweep) == decided
    assert differences(best, tmp_path / "unbroken") == []

    # Without halving, the jobs that left go on
    whole = cli("-m", *words[1:])
    assert "3 jobs: 2 done, 1 done before" in whole.out
    assert {one["status"] for one in results(sweep).values()} == {"ok"}


def test_failed_candidate_leaves_with_all_its_seeds(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreported: None
) -> None:
    prepare = job.prepare

    def prepare_or_fail(config: DictConfig, **how: Any) -> Any:
        if (config.seed, config.loraplus.ratio) == (2, 8):
            raise UserError("made up")
        return prepare(config, **how)

    monkeypatch.setattr(job, "prepare", prepare_or_fail)
    changes = ["trainer.max_steps=12", "trainer.eval_strategy=no", "task.samples=0", "seed=1,2"]
    finished = cli(*words[:-1], *changes, RATIOS)
    assert finished.status == 1
    sweep = the_sweep(tmp_path)
    (at_rung,) = decisions(sweep)["rungs"]
    names = {one["name"]: one["stays"] for one in at_rung["candidates"]}
    assert at_rung["step"] == 6
    assert names.keys() == {"loraplus.ratio=1", "loraplus.ratio=64"}
    statuses = {name: one["status"] for name, one in results(sweep).items()}
    assert statuses == {
        "ratio-8_seed-1": "pruned",
        "ratio-8_seed-2": "failed",
        **{
            f"ratio-{ratio}_seed-{seed}": "ok" if names[f"loraplus.ratio={ratio}"] else "pruned"
            for ratio in (1, 64)
            for seed in (1, 2)
        },
    }


def test_overrides_with_interpolations_are_those_of_the_search(
    cli: Cli, words: list[str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreported: None
) -> None:
    monkeypatch.setenv("ROWS", str(rows.parent))
    shorter = [word for word in words[:-1] if not word.startswith("data.train=")]
    changes = ["trainer.max_steps=8", "trainer.eval_strategy=no", "task.samples=0", "loraplus.ratio=1,8"]
    finished = cli(*shorter, *changes, f"data.train='${{oc.env:ROWS}}/{rows.name}'")
    assert finished.status == 0, finished.out[-3000:]
    sweep = the_sweep(tmp_path)
    assert sorted(one["status"] for one in results(sweep).values()) == ["ok", "pruned"]
    assert [one["step"] for one in decisions(sweep)["rungs"]] == [6]


def test_other_held_out_rows_are_an_error_at_the_first_rung(
    cli: Cli, words: list[str], tmp_path: Path, unreported: None
) -> None:
    changes = ["trainer.eval_strategy=no", "task.samples=0", "data.seed=0,1"]  # 20 of 40 rows each time
    finished = cli(*words[:-1], *changes)
    assert finished.status == 1
    assert "the jobs have different held-out rows, so they can't be compared: use halving=false" in finished.err
    found = results(the_sweep(tmp_path)).values()
    assert [(one["status"], one["steps"]) for one in found] == [("waiting", 12)] * 2
    assert len({one["inputs"]["data.eval"] for one in found}) == 2


def test_too_few_steps_for_a_rung_train_every_job(cli: Cli, words: list[str], tmp_path: Path, unreported: None) -> None:
    finished = cli(*words[:-1], "trainer.max_steps=5", "loraplus.ratio=1,8")
    assert finished.status == 0
    assert "5 steps are too few for a rung" in finished.out
    assert all(one["status"] == "ok" and one["samples"] for one in results(the_sweep(tmp_path)).values())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["loraplus.ratio=4"], "halving: there is nothing to compare"),
        (["loraplus.ratio=4", "seed=1,2"], "halving: there is nothing to compare"),
        (["loraplus.ratio=4", "++seed=1,2"], "halving: there is nothing to compare"),
        (["trainer.early_stopping_patience=2"], "trainer.early_stopping_patience: halving compares jobs"),
        (["trainer.max_steps=12,24"], "trainer.max_steps: halving compares jobs"),
        (["halving=3"], "halving: '3' is not a switch"),
        (["hydra.sweep.subdir='job${hydra.job.num}'"], "hydra.sweep.subdir: a job gets a new number"),
    ],
)
def test_what_cannot_be_halved_is_an_error_and_leaves_nothing(
    cli: Cli, words: list[str], changes: list[str], error: str, tmp_path: Path
) -> None:
    finished = cli(*words, *changes)
    assert finished.status != 0
    assert error in finished.out + finished.err
    assert not (tmp_path / "outputs").exists()


def test_single_run_is_not_halved(cli: Cli, words: list[str]) -> None:
    finished = cli(*words[1:-1], "halving=true")
    assert finished.status == 1
    assert "halving: halves a grid, and this is a single run" in finished.err


def test_ready_grid_is_halved_by_a_key(cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs of the first batch have failed here, so there is no other batch."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    launched: list[list[str]] = []

    def launch(_: Any, jobs: list[list[str]], **__: Any) -> list[Any]:
        launched.extend(jobs)
        return []

    monkeypatch.setattr(BasicLauncher, "launch", launch)
    cli(*words[1:-1], "hparams_search=ratio", "halving=true", "hydra.sweeper.max_batch_size=4")
    assert len(launched) == 6
    assert all("sweep.stop_at=0.0625" in job for job in launched)


def kill_at(pattern: str, words: list[str], place: Path) -> None:
    """Start the command, and kill it and its workers with -9 once a file of the pattern exists."""
    process = in_own_session(words, place)
    until = time.monotonic() + SECONDS
    while not list(place.glob(f"outputs/sweeps/*/{pattern}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"no {pattern} came"
        time.sleep(0.005)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate(timeout=SECONDS)


def finish(words: list[str], place: Path) -> None:
    process = in_own_session(words, place)
    output = "".join(process.communicate(timeout=SECONDS))
    assert process.returncode == 0, output[-3000:]


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_search_killed_between_and_inside_rungs_comes_to_the_same_decision(
    launcher: str, words: list[str], tmp_path: Path
) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        words = [*words, "launcher=joblib", "hydra.launcher.n_jobs=2"]
    for name in ("killed", "unbroken"):
        (tmp_path / name).mkdir()
    finish(words, tmp_path / "unbroken")
    for pattern in (
        "ratio-1_*/metrics.jsonl",  # before the first rung
        "ratio-8_*/checkpoints/checkpoint-6/manifest.json",  # at it, behind the checkpoint
        "halving.json",  # between two rungs
        "*/checkpoints/checkpoint-12/manifest.json",
        "*/checkpoints/checkpoint-24/manifest.json",
    ):
        kill_at(pattern, words, tmp_path / "killed")
    finish(words, tmp_path / "killed")
    killed, unbroken = the_sweep(tmp_path / "killed"), the_sweep(tmp_path / "unbroken")
    assert decisions(killed) == decisions(unbroken)
    assert {name: one["status"] for name, one in results(killed).items()} == {
        name: one["status"] for name, one in results(unbroken).items()
    }
    (winner,) = (path.parent.name for path in unbroken.glob("*/adapter"))
    assert differences(killed / winner, unbroken / winner) == []


@pytest.mark.slow
@pytest.mark.extras
def test_joblib_comes_to_the_decisions_of_one_process(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    for name, more in (("one", []), ("joblib", ["launcher=joblib", "hydra.launcher.n_jobs=2"])):
        (tmp_path / name).mkdir()
        finish([*words, *more], tmp_path / name)
    one, joblib = the_sweep(tmp_path / "one"), the_sweep(tmp_path / "joblib")
    assert decisions(one) == decisions(joblib)
    (winner,) = (path.parent.name for path in one.glob("*/adapter"))
    assert differences(joblib / winner, one / winner) == []
