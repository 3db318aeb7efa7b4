"""Several processes: every tensor trains at the rate that `inspect` printed, whatever wraps the model."""

from __future__ import annotations

import json
import math
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


def test_classifier_has_the_same_step_and_losses_in_two_processes_as_in_one(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    made = [{"text": f"say {n}", "label": "abc"[n % 3]} for n in range(12)]
    # The five rows for evaluation fill four batches of two, so three rows are repeated
    path, held_out = write_jsonl(tmp_path / "rows.jsonl", made), write_jsonl(tmp_path / "eval.jsonl", made[:5])
    shared = [*tiny_run, "task=classification", f"data.train={path}", f"data.eval={held_out}", "trainer.max_steps=1"]
    shared += ["adapter.lora_dropout=0", "trainer.per_device_eval_batch_size=2"]
    run(compose(*shared), tmp_path / "one")
    ended = two_ranks(*shared, "trainer.per_device_train_batch_size=2", "hydra.run.dir=two", folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    for key, accuracy in (("loss", 1e-4), ("grad_norm", 1e-3), ("eval_loss", 1e-5)):
        alone, together = (next(line[key] for line in lines(tmp_path / name) if key in line) for name in ("one", "two"))
        assert together == pytest.approx(alone, rel=accuracy), key


def test_pairs_of_answers_are_evaluated_in_two_processes(tiny_run: list[str], tmp_path: Path) -> None:
    pairs = [{"prompt": f"say {n}", "chosen": f" {n}", "rejected": f" {n + 1}"} for n in range(11)]
    path, held_out = write_jsonl(tmp_path / "pairs.jsonl", pairs), write_jsonl(tmp_path / "eval.jsonl", pairs[:5])
    words = [*tiny_run, "task=dpo", f"data.train={path}", f"data.eval={held_out}", "trainer.max_steps=1"]
    ended = two_ranks(*words, "trainer.per_device_eval_batch_size=2", "hydra.run.dir=two", folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    # Before the first step, the adapter changes nothing, so each pair's loss is -log sigmoid(0)
    assert lines(tmp_path / "two")[0]["eval_loss"] == pytest.approx(math.log(2), rel=1e-4)


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
