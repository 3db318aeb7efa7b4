"""Sweeps under joblib, submitit and Ray, and one GPU for each worker."""

from __future__ import annotations

import importlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from loraplus_hydra.sweep import gpus
from tests.conftest import Finished

pytestmark = pytest.mark.extras


Cli = Callable[..., Finished]
ROOT = Path(__file__).resolve().parents[2]
ENGINES = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "hydra.launcher.timeout_min=10"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "hydra.launcher.ray.init.num_cpus=2"),
}


def sweep(words: list[str], place: Path) -> Path:
    """Run the ratio sweep over two values in a subprocess, and return its folder."""
    place.mkdir()
    command = [sys.executable, "-m", "loraplus_hydra", "hparams_search=ratio", "loraplus.ratio=1,4", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    finished = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "2 jobs: 2 done" in finished.stdout
    (folder,) = (place / "outputs" / "sweeps").iterdir()
    return folder


def results(folder: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}


@pytest.fixture(scope="module")
def quick(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "trainer.max_steps=2", "trainer.eval_strategy=no", "task.samples=0"]


@pytest.fixture(scope="module")
def in_one_process(quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(quick, tmp_path_factory.mktemp("basic") / "place")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_runs_the_ratio_sweep_as_one_process_does(
    engine: str, quick: list[str], in_one_process: Path, tmp_path: Path
) -> None:
    plugin, setting = ENGINES[engine]
    pytest.importorskip(plugin)
    folder = sweep([f"launcher={engine}", setting, *quick], tmp_path / "place")
    expected = {name: result["metrics"]["eval_loss"] for name, result in results(in_one_process).items()}
    assert {name: result["metrics"]["eval_loss"] for name, result in results(folder).items()} == expected
    assert folder.name == in_one_process.name  # whoever runs the jobs, it is the same sweep
    assert (folder / "report.html").is_file()
    assert len((folder / "results.csv").read_text().splitlines()) == 3


def test_slurm_is_asked_for_one_gpu_and_the_cores_of_a_job(
    cli: Cli, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    programs = tmp_path / "programs"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text(f'#!/bin/sh\ncp "$1" {tmp_path / "asked.sh"}\necho refused >&2\nexit 1\n')
    (programs / "srun").write_text("#!/bin/sh\nexit 0\n")
    for program in programs.iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    finished = cli("-m", "launcher=submitit_slurm", "hydra.launcher.partition=small", "loraplus.ratio=1,4", *quick)
    assert finished.status == 1
    assert "refused" in finished.err
    asked = (tmp_path / "asked.sh").read_text()
    for line in ("gpus-per-node=1", "cpus-per-task=8", "mem=32GB", "time=240", "partition=small", "array=0-1%2"):
        assert f"#SBATCH --{line}\n" in asked
    assert "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" in asked


def stored(group: str, option: str) -> dict[str, Any]:
    """Return the group's node in Hydra's store, which holds the options of plugins."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # finds the plugins
    node: Any = ConfigStore.instance().repo["hydra"][group]
    return node


@pytest.mark.parametrize(
    ("words", "group", "option", "fix"),
    [
        (["-m", "launcher=joblib"], "launcher", "joblib", "pip install 'loraplus_hydra[joblib]'"),
        (["-m", "hydra/launcher=submitit_slurm"], "launcher", "submitit_slurm", "loraplus_hydra[submitit]"),
        (["-m", "launcher=ray"], "launcher", "ray", "pip install --no-deps 'hydra-ray-launcher"),
        (["hparams_search=optuna"], "sweeper", "optuna", "pip install --no-deps 'hydra-optuna-sweeper"),
    ],
)
def test_plugin_that_is_missing_is_told_with_what_installs_it(
    words: list[str], group: str, option: str, fix: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(stored(group, option), f"{option}.yaml", raising=False)
    finished = cli(*words)
    assert finished.status == 1
    assert f"hydra/{group}/{option} is an option of a Hydra plugin" in finished.err
    assert fix in finished.err


@pytest.mark.parametrize("plugin", ["joblib_launcher.JoblibLauncher", "submitit_launcher.LocalLauncher"])
def test_launchers_that_hand_out_no_gpus_are_known_by_name(plugin: str) -> None:
    module, name = plugin.split(".")
    package = "hydra_joblib_launcher" if module.startswith("joblib") else "hydra_submitit_launcher"
    pytest.importorskip(f"hydra_plugins.{package}")
    found = getattr(importlib.import_module(f"hydra_plugins.{package}.{module}"), name)
    assert f"{found.__module__}.{found.__name__}".endswith(gpus._LAUNCHERS)


JOBLIB = OmegaConf.create(
    {"launcher": {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}}
)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpus, "_held", [])
    yield
    for lock in gpus._held:
        lock.release()


def next_worker(monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Return the GPU that another process gets while the earlier locks are held."""
    monkeypatch.setattr(gpus, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return gpus.claim_gpu(JOBLIB)


@pytest.mark.usefixtures("two_gpus")
def test_workers_get_gpus_of_their_own_and_share_evenly_when_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [next_worker(monkeypatch) for _ in range(4)] == ["0", "1", "0", "1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert gpus.claim_gpu(JOBLIB) is None  # the next job of the same process keeps what it has
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.usefixtures("two_gpus")
def test_gpu_is_free_again_when_its_worker_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next_worker(monkeypatch) == "0"
    ended = gpus._held
    assert next_worker(monkeypatch) == "1"
    ended.pop().release()
    assert next_worker(monkeypatch) == "0"


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_chosen_among_those_that_the_user_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus.claim_gpu(JOBLIB) == "3"


@pytest.mark.usefixtures("two_gpus")
def test_launchers_that_hand_out_gpus_themselves_are_left_alone() -> None:
    for target in (
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    ):
        assert gpus.claim_gpu(OmegaConf.create({"launcher": {"_target_": target}})) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
