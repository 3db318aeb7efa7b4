"""A sweep survives its failures, finds its folder again, and runs only what is missing there."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished

Cli = Callable[..., Finished]


@pytest.fixture
def tiny_sweep(tiny_run: list[str]) -> list[str]:
    return ["-m", *tiny_run, "task.samples=0", "trainer.max_steps=2", "trainer.eval_strategy=no"]


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the folders for which a report was requested; none is made."""
    from loraplus_hydra.sweep import finish

    folders: list[Path] = []

    def reporting(folder: Path) -> tuple[str, ...]:
        folders.append(folder)
        return ()

    monkeypatch.setattr(finish, "_report", reporting)
    return folders


def the_sweep(place: Path) -> Path:
    """Return the folder of the only sweep below `place`."""
    (folder,) = (place / "outputs" / "sweeps").iterdir()
    return folder


def results(sweep: Path) -> dict[str, dict[str, Any]]:
    """Return each job's result, by the name of its folder without the hash."""
    return {path.parent.name.rpartition("_")[0]: json.loads(path.read_text()) for path in sweep.glob("*/result.json")}


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and content of every file below `folder`."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_failed_jobs_harm_no_other_and_run_again_alone(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, reported: list[Path]
) -> None:
    sweep = [*tiny_sweep, "loraplus.ratio=4,-2,1e30", "hydra.sweeper.max_batch_size=1"]
    first = cli(*sweep)
    folder = the_sweep(tmp_path)
    assert first.status == 1
    assert reported == [folder]
    assert "3 jobs: 1 done, 2 failed" in first.out
    found = results(folder)
    assert {name: result["status"] for name, result in found.items()} == {
        "ratio-4": "ok",
        "ratio--2": "failed",
        "ratio-1e30": "failed",
    }
    assert "out of range" in found["ratio--2"]["error"]["text"]
    assert found["ratio-1e30"]["error"]["type"] == "NotFiniteError"
    for name, words in (("ratio--2", "out of range"), ("ratio-1e30", "Traceback")):
        (log,) = folder.glob(f"{name}_*/loraplus_hydra.log")
        assert words in log.read_text()
        assert words in first.out or words == "Traceback"
    assert json.loads((folder / "sweep.json").read_text()) == {
        "name": folder.name,
        "command": shlex.join(["python", "-m", "loraplus_hydra", *sweep]),
        "swept": ["loraplus.ratio"],
        "jobs": 3,
    }
    (done,) = folder.glob("ratio-4_*")
    before = files(done)
    second = cli(*sweep)
    assert second.status == 1
    assert f"Done before: {done.name}: eval_loss {found['ratio-4']['metrics']['eval_loss']}" in second.out
    assert "3 jobs: 1 done before, 2 failed" in second.out
    assert files(done) == before
    assert not (folder / ".jobs").exists()


def test_job_with_relative_paths_that_was_killed_in_its_first_start_resumes(
    cli: Cli, tiny_sweep: list[str], tiny_model: Path, rows: Path, tmp_path: Path, reported: list[Path]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("train", "held_out"):
        shutil.copy(rows, tmp_path / f"{name}.jsonl")
    paths = ["model.path=model", "data.train=train.jsonl", "data.eval=held_out.jsonl", "forgetting=held_out.jsonl"]
    command = [*tiny_sweep, *paths, "trainer.save_steps=1", "seed=1,2"]
    assert cli(*command).status == 0
    (job,) = the_sweep(tmp_path).glob("seed-1_*")
    # As a kill in step 2 leaves it
    for name in ("adapter", "checkpoints/checkpoint-2"):
        shutil.rmtree(job / name)
    (job / "result.json").unlink()
    again = cli(*command)
    assert again.status == 0, again.out
    result = json.loads((job / "result.json").read_text())
    assert (result["status"], result["steps"], result["resumed_at"]) == ("ok", 2, [1])


def test_job_that_another_start_has_finished_meanwhile_is_kept(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, reported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command given twice: one start imports its libraries while the other one trains the job."""
    from loraplus_hydra.sweep import jobs

    isolated, meanwhile = jobs.isolated, tmp_path / "meanwhile"
    command = [*tiny_sweep, "trainer.save_strategy=no", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert cli(*command).status == 0
    shutil.move(tmp_path / "sweep", meanwhile)
    (done,) = meanwhile.glob("seed-1_*")
    before = files(done / "adapter")

    def slow_imports(config: Any) -> Any:
        if config.seed == 1:
            shutil.copytree(done, tmp_path / "sweep" / done.name, dirs_exist_ok=True)
        return isolated(config)

    monkeypatch.setattr(jobs, "isolated", slow_imports)
    finished = cli(*command)
    assert finished.status == 0, finished.out
    assert files(tmp_path / "sweep" / done.name / "adapter") == before


def test_hydras_lines_about_jobs_have_no_credentials(cli: Cli, reported: list[Path]) -> None:
    address = "https://me:s3cret@127.0.0.1/rows.jsonl"
    finished = cli("-m", "data=jsonl", f"data.train={address}", "seed=1,2")  # each job is refused for the address
    assert "127.0.0.1/rows.jsonl seed=2" in finished.err
    assert "s3cret" not in finished.out + finished.err


def test_more_values_extend_the_sweep(cli: Cli, tiny_sweep: list[str], tmp_path: Path, reported: list[Path]) -> None:
    assert cli(*tiny_sweep, "loraplus.ratio=1,2").status == 0
    finished = cli(*tiny_sweep, "loraplus.ratio=2,3")
    assert finished.status == 0
    assert "2 jobs: 1 done, 1 done before" in finished.out
    again = cli(*tiny_sweep, "loraplus.ratio=1", "seed=0,1", f"hydra.sweep.dir={the_sweep(tmp_path)}")
    assert "2 jobs: 1 done, 1 done before" in again.out  # the job is known by its config, whatever is swept
    assert set(results(the_sweep(tmp_path))) == {"ratio-1", "ratio-2", "ratio-3", "seed-1"}


def test_start_whose_name_looks_like_a_number_knows_its_jobs(
    cli: Cli, tiny_sweep: list[str], reported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import uuid

    monkeypatch.setattr("loraplus_hydra.io.job_status.uuid.uuid4", lambda: uuid.UUID(hex="12e456789012" + "0" * 20))
    assert "2 jobs: 2 done" in cli(*tiny_sweep, "loraplus.ratio=1,2").out


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tiny_sweep: list[str], cli: Cli) -> Callable[..., str]:
    """Return a function that names the sweep of a command, and runs no job."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from loraplus_hydra.cli import before_run

    begun: list[str] = []
    begin = before_run.begin

    def beginning(*arguments: Any) -> Any:
        sweep = begin(*arguments)
        begun.append(sweep.folder.name)
        return sweep

    monkeypatch.setattr(before_run, "begin", beginning)
    monkeypatch.setattr(BasicSweeper, "sweep", lambda *_, **__: None)

    def named(*words: str) -> str:
        finished = cli(*(tiny_sweep if "-m" in words else tiny_sweep[1:]), *(word for word in words if word != "-m"))
        assert finished.status == 0, finished.err
        return begun[-1]

    return named


def test_sweep_of_other_settings_or_keys_is_another(names: Callable[..., str], tmp_path: Path) -> None:
    ratio = names("-m", "loraplus.ratio=1,2")
    assert ratio.startswith("ratio_")
    assert names("-m", "loraplus.ratio=3,4,5") == ratio
    assert names("-m", "seed=0", "loraplus.ratio=1,2") == ratio
    assert names("-m", "loraplus.ratio=1,2", "trainer.max_steps=3") != ratio
    assert names("-m", "loraplus.ratio=1,2", "seed=1,2").startswith("ratio_seed_")
    assert names("-m", "loraplus.ratio=1", "seed=1,2").startswith("seed_")
    assert names("-m", "+trainer.label_smoothing_factor=0.1,0.2").startswith("label_smoothing_factor_")
    assert names("-m", "loraplus.ratio=2,3", "sweep.name=mine") == "mine"
    assert not (tmp_path / "outputs/sweeps/mine").exists()  # no job came of it


def test_sweep_over_a_group_has_one_name(names: Callable[..., str]) -> None:
    options = names("-m", "optimizer=adam,sgd", "optimizer.weight_decay=0.1")
    assert options.startswith("optimizer_")
    assert names("-m", "optimizer=sgd,adamw,adam", "optimizer.weight_decay=0.1") == options
    assert names("-m", "optimizer=adam,sgd") != options
    momentum = names("-m", "optimizer=sgd,muon", "++optimizer.momentum=0.5")
    assert names("-m", "optimizer=sgd,muon", "++optimizer.momentum=0.6") != momentum
    rates = names("-m", "optimizer=adam,sgd", "optimizer.lr=1e-4,3e-4", "optimizer.weight_decay=0.1")
    assert names("-m", "optimizer=adam,sgd", "optimizer.lr=1e-4,1e-3", "optimizer.weight_decay=0.1") == rates
    assert names("-m", "optimizer=adam,sgd", "optimizer.lr=1e-4,3e-4", "optimizer.weight_decay=0.2") != rates
    assert names("-m", "optimizer=sgd,muon", "++optimizer.momentum=0.5,0.6") == names(
        "-m", "optimizer=sgd,muon", "++optimizer.momentum=0.5,0.7"
    )


def test_ready_sweep_is_the_same_sweep_as_its_command(names: Callable[..., str]) -> None:
    assert names("hparams_search=ratio") == names("-m", "loraplus.ratio=1,2")
    assert names("hparams_search=ratio", "seed=1,2") == names("-m", "seed=1,2", "loraplus.ratio=1,2")
    assert names("hparams_search=ratio", "loraplus.ratio=4", "-m", "seed=1,2").startswith("seed_")
    assert names("hparams_search=lr_grid").startswith("lr_A_lr_B_")


def test_ready_sweeps_hold_what_they_say() -> None:
    from omegaconf import OmegaConf

    from loraplus_hydra.config.locations import config_folder

    def params(name: str) -> dict[str, list[float]]:
        config = OmegaConf.load(config_folder() / "hparams_search" / f"{name}.yaml")
        assert config.hydra.mode == "MULTIRUN"
        return {key: [float(one) for one in str(text).split(",")] for key, text in config.hydra.sweeper.params.items()}

    assert params("ratio")["loraplus.ratio"][0] == 1
    grid = params("lr_grid")
    assert grid["loraplus.lr_A"] == grid["loraplus.lr_B"]  # so that there is a diagonal
    assert len(grid["loraplus.lr_A"]) == 5
    assert len(set(params("seeds")["seed"])) == 5


def test_folder_of_another_config_is_left_as_it_is(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, reported: list[Path]
) -> None:
    place = ["hydra.sweep.dir=mine", "hydra.sweep.subdir='job${hydra.job.num}'"]
    assert cli(*tiny_sweep, *place, "loraplus.ratio=2").status == 0
    before = files(tmp_path / "mine" / "job0")
    finished = cli(*tiny_sweep, *place, "loraplus.ratio=3")
    assert finished.status == 1
    assert "has the run of another config" in finished.out
    assert files(tmp_path / "mine" / "job0") == before
    assert reported == [tmp_path / "mine"] * 2


def test_job_that_exits_is_a_failed_job(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, reported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.runs import job
    from loraplus_hydra.training.hf_trainer import train as training

    train = training.train

    def exiting(trainer: Any, prepared: Any, *rest: Any) -> Any:
        if prepared.config.seed == 1:
            raise SystemExit("the data loader gave up")
        return train(trainer, prepared, *rest)

    monkeypatch.setattr(job, "train", exiting)
    assert cli(*tiny_sweep, "seed=1,2").status == 1
    found = results(the_sweep(tmp_path))
    assert {name: result["status"] for name, result in found.items()} == {"seed-1": "failed", "seed-2": "ok"}
    assert found["seed-1"]["error"] == {"type": "SystemExit", "text": "the data loader gave up"}


@pytest.mark.parametrize(("exception", "code"), [("KeyboardInterrupt", 130), ("Terminated", 143)])
def test_interrupted_sweep_ends_with_the_report_of_what_is_there(
    cli: Cli,
    tiny_sweep: list[str],
    tmp_path: Path,
    reported: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    exception: str,
    code: int,
) -> None:
    from loraplus_hydra.io.interrupts import Interrupted
    from loraplus_hydra.runs import job
    from loraplus_hydra.training.hf_trainer import train as training

    train = training.train

    def interrupted(trainer: Any, prepared: Any, *rest: Any) -> Any:
        if prepared.config.seed == 2:
            raise Interrupted(signal.SIGTERM) if exception == "Terminated" else KeyboardInterrupt
        return train(trainer, prepared, *rest)

    monkeypatch.setattr(job, "train", interrupted)
    finished = cli(*tiny_sweep, "seed=1,2,3")
    folder = the_sweep(tmp_path)
    assert finished.status == code
    assert "2 of 3 jobs run: 1 done, 1 interrupted" in finished.out
    assert reported == [folder]
    assert {name: result["status"] for name, result in results(folder).items()} == {
        "seed-1": "ok",
        "seed-2": "interrupted",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loraplus.ratio=1,2", "optimizr=a"], "did you mean 'optimizer'"),
        (["optimizer=adamw,adamx"], "no option 'adamx'"),
        (["loraplus.ratio=1,2", "sweep.name=../up"], "is not a valid folder name"),
        (["loraplus.ratio=1,2", "sweep.nam=x"], "did you mean 'name'"),
        (["optimizer=sgd,muon", "optimizer.momentum=0.5"], "write ++optimizer.momentum=0.5"),
        (["optimizer.lr=1e-3,2e-3,0.001"], "- optimizer.lr: 0.001 is given twice; give each value once"),
        (["loraplus.ratio=1,4,1.0"], "- loraplus.ratio: 1 and 1.0 are the same value"),
        (["optimizer=sgd,'sgd'"], "- optimizer: sgd and 'sgd' are the same value"),
        (["optimizer=sgd,muon", "+optimizer.momentum=0.5"], "in a sweep of groups: ++optimizer.momentum=0.5"),
    ],
)
def test_sweep_that_does_not_compose_leaves_nothing(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    finished = cli(*tiny_sweep, *words)
    assert finished.status == 1
    assert message in finished.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_sweep_that_the_config_asks_for_is_refused_under_torchrun(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    finished = cli("hparams_search=ratio")
    assert finished.status == 1
    assert "torchrun" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_report_that_can_not_be_made_is_told_and_hides_no_job(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loraplus_hydra.report.write as report

    def broken(folder: Path) -> None:
        raise OSError("no room for it")

    monkeypatch.setattr(report, "write_report", broken)
    finished = cli(*tiny_sweep, "loraplus.ratio=-1,2")
    assert finished.status == 1
    assert "The report could not be written: OSError: no room for it" in finished.err
    assert "2 jobs: 1 done, 1 failed" in finished.out
    assert "ratio--1_" in finished.out.partition("2 jobs")[2]


def test_report_is_made_and_shown_at_the_end(cli: Cli, tiny_sweep: list[str], tmp_path: Path) -> None:
    finished = cli(*tiny_sweep, "loraplus.ratio=1,-1,4")
    folder = the_sweep(tmp_path)
    assert finished.status == 1
    assert (folder / "report.html").is_file()
    assert len((folder / "results.csv").read_text().splitlines()) == 4
    assert "Without a result" in finished.out
