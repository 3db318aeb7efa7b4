"""Several processes: every tensor trains at the rate that `inspect` printed, whatever wraps the model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import Finished
from tests.support.distributed_worker import write_rates
from tests.support.forking import lines
from tests.support.processes import Ended, command_line, run_in_two_ranks
from tests.support.tiny import write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*words: str, folder: Path) -> Ended:
    """Run the command line under torchrun, in two processes of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "loraplus_hydra", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return Ended(done.returncode, done.stdout + done.stderr)


def two_ranks(*words: str, folder: Path) -> Ended:
    """Run the command line in two forked processes, in the environment that torchrun would give them."""
    return run_in_two_ranks(command_line, *words, folder=folder)


def own_name(name: str) -> str:
    """Return PEFT's name of a tensor in a file: without the adapter's name."""
    return re.sub(r"\.default", "", name).replace("magnitude_vector.weight", "magnitude_vector")


@pytest.mark.parametrize("how", ["ddp", "fsdp1", "fsdp2"])
def test_each_tensor_trains_at_the_rate_that_inspect_printed(
    how: str, cli: Callable[..., Finished], tiny_model: Path, tmp_path: Path
) -> None:
    printed = cli("inspect", "--json", "model=hub", f"model.path={tiny_model}", "adapter=dora", "loraplus.ratio=16")
    ended = run_in_two_ranks(write_rates, how, str(tiny_model), str(tmp_path), folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    rates = json.loads((tmp_path / f"{how}.json").read_text())
    if how == "fsdp2":  # the worker saved the adapter of the split model
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        trained = {own_name(tensor["name"]): tensor["shape"] for tensor in json.loads(printed.out)["tensors"]}
        assert {name: list(tensor.shape) for name, tensor in saved.items()} == trained
    assert rates == pytest.approx({tensor["name"]: tensor["lr"] for tensor in json.loads(printed.out)["tensors"]})


@pytest.mark.parametrize("start", [two_ranks, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_two_processes_share_one_run_folder_and_train_as_one(
    start: Callable[..., Ended], tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    shared = [*tiny_run, "data.eval_fraction=0.25", "trainer.max_steps=5"]
    alone_only = "trainer.per_device_train_batch_size"
    words = [override for override in shared if not override.startswith(alone_only)]
    words += ["trainer.per_device_train_batch_size=2", "hydra.run.dir=two"]
    done = start(*words, folder=tmp_path)
    assert done.status == 0, done.out[-3000:]
    alone = run(compose(*shared), tmp_path / "one")
    together = json.loads((tmp_path / "two" / "result.json").read_text())
    assert together["status"] == "ok"
    assert (tmp_path / "two" / ".hydra" / "config.yaml").is_file()
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()
    assert together["metrics_before"]["eval_loss"] == pytest.approx(alone.metrics_before["eval_loss"], rel=1e-5)
    assert together["metrics"]["eval_loss"] == pytest.approx(alone.metrics["eval_loss"], rel=1e-4)
    assert done.out.count("All files are in") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_classifier_takes_the_same_step_in_two_processes_as_in_one(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"say {n}", "label": "abc"[n % 3]} for n in range(12)])
    shared = [*tiny_run, "task=classification", f"data.train={path}", f"data.eval={path}", "trainer.max_steps=1"]
    shared += ["adapter.lora_dropout=0"]
    run(compose(*shared), tmp_path / "one")
    words = [*shared, "trainer.per_device_train_batch_size=2", "hydra.run.dir=two"]
    ended = two_ranks(*words, folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    alone, together = (next(line for line in lines(tmp_path / name) if "grad_norm" in line) for name in ("one", "two"))
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


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
