"""DeepSpeed on two CPU processes: the weights of DDP, resume, and a checkpoint from a stranger."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraplus_hydra.io.checkpoints import seal

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    *("trainer.use_cpu=true", "trainer.bf16=false", "trainer.max_steps=6", "trainer.save_steps=3"),
    *("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.eval_strategy=no"),
    *("trainer.max_grad_norm=0.1", "trainer.logging_steps=1"),
)


def run(folder: Path, *arguments: str) -> str:
    """Run the program in two processes, and return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        [*command, "-m", "loraplus_hydra", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return ended.stdout + ended.stderr


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "adapter" / "adapter_model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code_was_run",)


@pytest.mark.parametrize("stage", [2, 3])
def test_run_has_the_weights_of_ddp_resumes_and_executes_no_state_of_a_stranger(
    stage: int, tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *SHARED]
    log = run(tmp_path, *overrides, "trainer=ddp", "hydra.run.dir=ddp")
    assert (tmp_path / "ddp" / "adapter").is_dir(), log[-3000:]
    own = ["trainer=deepspeed", f"trainer.deepspeed.zero_optimization.stage={stage}", "hydra.run.dir=run"]
    log = run(tmp_path, *overrides, *own)
    assert (tmp_path / "run" / "adapter").is_dir(), log[-3000:]
    assert largest_difference(tmp_path / "run", tmp_path / "ddp") < 1e-4  # rates move A by 0.002 and B by 0.014
    for name in ("run", "ddp"):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        rates = [line["lr"] for line in lines if "lr" in line]
        assert len(rates) == 6
        assert all(rate["groupB"] == pytest.approx(8 * rate["groupA"]) for rate in rates)

    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "checkpoint-6")
    (tmp_path / "killed" / "result.json").unlink()
    shutil.copytree(tmp_path / "killed", tmp_path / "strange")
    log = run(tmp_path, "resume", "killed")
    assert (tmp_path / "killed" / "adapter").is_dir(), log[-3000:]
    assert largest_difference(tmp_path / "run", tmp_path / "killed") == 0

    checkpoint = tmp_path / "strange" / "checkpoints" / "checkpoint-3"
    (checkpoint / "manifest.json").unlink()
    for state in checkpoint.glob("global_step3/*model_states.pt"):
        torch.save({**torch.load(state, weights_only=True), "more": Code()}, state)
    seal(checkpoint)
    log = run(tmp_path, "resume", "strange")
    assert "loading it could run code" in log, log[-3000:]
    assert not (tmp_path / "code_was_run").exists()
    assert not (tmp_path / "strange" / "adapter").exists()
