"""An Optuna search keeps its study in a file, and continues it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished

pytestmark = pytest.mark.extras

optuna = pytest.importorskip("optuna")
pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

Cli = Callable[..., Finished]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny_search(tiny_run: list[str], tmp_path: Path) -> list[str]:
    return [
        "hparams_search=optuna",
        *(word for word in tiny_run if not word.startswith("optimizer.lr")),
        "trainer.max_steps=1",
        "trainer.eval_strategy=no",
        "task.samples=0",
        f"hydra.sweep.dir={tmp_path / 'search'}",
    ]


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplus_hydra.sweep import finish

    monkeypatch.setattr(finish, "_report", lambda _: ())


def study(folder: Path) -> Any:
    return optuna.load_study(study_name="loraplus", storage=f"sqlite:///{folder / 'study.db'}")


def values(folder: Path) -> list[float]:
    return [trial.value for trial in study(folder).trials if trial.value is not None]


def metrics(folder: Path) -> list[float]:
    found = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    return [result["metrics"]["eval_loss"] for result in found if result["status"] == "ok"]


def test_search_goes_on_to_as_many_trials_as_are_asked_for(
    cli: Cli, tiny_search: list[str], tmp_path: Path, without_report: None
) -> None:
    folder = tmp_path / "search"
    assert cli(*tiny_search, "hydra.sweeper.n_trials=2").status == 0
    first = study(folder).trials
    assert len(first) == 2
    more = cli(*tiny_search, "hydra.sweeper.n_trials=3")
    assert more.status == 0
    assert "The study has 2 finished trials" in more.out
    assert "1 to go" in more.out
    trials = study(folder).trials
    assert [trial.params for trial in trials[:2]] == [trial.params for trial in first]
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 3  # no proposal of the first start comes again
    assert sorted(values(folder)) == sorted(metrics(folder))
    again = cli(*tiny_search, "hydra.sweeper.n_trials=3")
    assert again.status == 0
    assert "1/6" not in again.out  # no job ran
    assert len(study(folder).trials) == 3


def test_failed_trial_ends_no_search_and_is_tried_again(
    cli: Cli, tiny_search: list[str], tmp_path: Path, without_report: None
) -> None:
    search = [*tiny_search, "hydra.sweeper.n_trials=2", "loraplus.ratio=choice(4,-1)", "optimizer.lr=choice(1e-3)"]
    search.append("hydra.sweeper.sampler._target_=tests.sweep.test_sweep_search.in_turn")
    assert cli(*search).status == 1
    states = {trial.params["loraplus.ratio"]: trial.state.name for trial in study(tmp_path / "search").trials}
    assert states == {4: "COMPLETE", -1: "FAIL"}
    again = cli(*search)
    assert again.status == 1
    assert [trial.params["loraplus.ratio"] for trial in study(tmp_path / "search").trials] == [4, -1, -1]


def in_turn(**_: Any) -> Any:
    """Return a sampler that takes the choices in their order."""

    class InTurn(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return distribution.choices[trial.number % len(distribution.choices)]

    return InTurn()


def test_search_for_a_metric_that_should_grow_maximises(compose: Callable[..., Any], tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from loraplus_hydra.io import job_status
    from loraplus_hydra.sweep.plan import Sweep
    from loraplus_hydra.sweep.search import _SWEEPER, continue_study

    sweeper = {"_target_": _SWEEPER, "storage": f"sqlite:///{tmp_path}/study.db", "study_name": "loraplus"}
    sweeper |= {"n_trials": 5, "direction": None, "sampler": {"seed": 3}}
    config = OmegaConf.create({"hydra": {"sweeper": sweeper}, "task": {"greater_is_better": True}})
    continue_study(config, Sweep(tmp_path, (), job_status.begin(tmp_path), is_new=True))
    assert config.hydra.sweeper.direction == "maximize"
    assert study(tmp_path).direction.name == "MAXIMIZE"
    assert (config.hydra.sweeper.n_trials, config.hydra.sweeper.sampler.seed) == (5, 3)


def test_second_process_leaves_a_search_under_way_alone(
    cli: Cli, tiny_search: list[str], tmp_path: Path, without_report: None
) -> None:
    from loraplus_hydra.io import job_status

    folder = tmp_path / "search"
    folder.mkdir()
    start = job_status.begin(folder)  # as another process does
    refused = cli(*tiny_search)
    assert refused.status == 1
    assert "another process runs this search" in refused.err
    job_status.end(start)
    assert cli(*tiny_search, "hydra.sweeper.n_trials=1").status == 0


@pytest.mark.slow
def test_killed_search_goes_on_from_its_file(tiny_search: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "search"
    command = [sys.executable, "-m", "loraplus_hydra", *tiny_search, "hydra.sweeper.n_trials=4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(metrics(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in folder.glob("*/result.json")}
    assert len(before) >= 2
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert sorted(values(folder)) == sorted(metrics(folder))
    assert len(values(folder)) == 4
    assert {path: path.read_bytes() for path in before} == before  # with its times
    assert (folder / "report.html").is_file()
