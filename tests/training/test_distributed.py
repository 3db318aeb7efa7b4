"""Several processes: every tensor trains at the rate that `inspect` printed, whatever wraps the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.support.distributed_worker import write_rates
from tests.support.processes import command_line, run_in_two_ranks

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    return subprocess.run(launcher, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("how", ["ddp", "fsdp1", "fsdp2"])
def test_each_tensor_trains_at_the_rate_that_inspect_printed(
    how: str, cli: Callable[..., Finished], tiny_model: Path, tmp_path: Path
) -> None:
    printed = cli("inspect", "--json", "model=hub", f"model.path={tiny_model}", "adapter=dora", "loraplus.ratio=16")
    ended = run_in_two_ranks(write_rates, how, str(tiny_model), str(tmp_path), folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    rates = json.loads((tmp_path / f"{how}.json").read_text())
    assert rates == pytest.approx({tensor["name"]: tensor["lr"] for tensor in json.loads(printed.out)["tensors"]})


def test_two_processes_share_one_run_folder_and_train_as_one(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    shared = [*tiny_run, "data.eval_fraction=0.25", "trainer.max_steps=5"]
    done = torchrun(
        "-m",
        "loraplus_hydra",
        *[override for override in shared if "train_batch_size" not in override],
        "trainer.per_device_train_batch_size=2",
        "trainer.max_steps=5",
        f"hydra.run.dir={tmp_path / 'two'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run(compose(*shared), tmp_path / "one")
    together = json.loads((tmp_path / "two" / "result.json").read_text())
    assert together["status"] == "ok"
    assert (tmp_path / "two" / ".hydra" / "config.yaml").is_file()
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()
    assert together["metrics_before"]["eval_loss"] == pytest.approx(alone.metrics_before["eval_loss"], rel=1e-5)
    assert together["metrics"]["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=1e-4)
    assert done.stdout.count("All files are in") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_sweep_under_torchrun_is_refused(cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    finished = cli("-m", "loraplus.ratio=1,2")
    assert finished.status == 1
    assert "torchrun" in finished.err


def test_fsdp_in_one_process_is_refused(cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path) -> None:
    finished = cli(*tiny_run, "trainer=fsdp2", "trainer.use_cpu=true", "trainer.bf16=false")
    assert finished.status == 1
    assert "trainer.fsdp: FSDP needs several processes" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_requested_fsdp_that_is_not_active_is_an_error(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, "trainer=fsdp2", "trainer.use_cpu=true", "trainer.bf16=false", "hydra.run.dir=run"]
    ended = run_in_two_ranks(command_line, *overrides, folder=tmp_path)
    assert ended.status == 1
    assert "FSDP is not active" in ended.out
