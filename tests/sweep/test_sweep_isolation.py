"""A job of a sweep gives the same bits as its config alone in a fresh process."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Finished

Cli = Callable[..., Finished]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny_sweep(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a run with dropout and tensors large enough for 8-bit states; no report is made."""
    from loraplus_hydra.sweep import finish

    monkeypatch.setattr(finish, "_report", lambda _: ())
    return [*tiny_run, "trainer.max_steps=3", "task.samples=0", "adapter.r=128", "adapter.lora_dropout=0.1"]


def trained(folder: Path) -> tuple[list[tuple[int, float]], bytes]:
    """Return the loss of every step, and the adapter's stored weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]
    return losses, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def alone(words: list[str], folder: Path) -> tuple[list[tuple[int, float]], bytes]:
    """Train in a fresh process, and return the same as `trained`."""
    command = [sys.executable, "-m", "loraplus_hydra", *words, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return trained(folder)


@pytest.mark.slow
def test_jobs_are_the_same_as_alone_in_a_fresh_process_in_any_order(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path
) -> None:
    # A job with full determinism sets the environment and torch's flags; the next one mustn't see them.
    flags = {"false": "+trainer.full_determinism=false", "true": "+trainer.full_determinism=true"}
    wanted = {
        name: alone([*tiny_sweep, f"optimizer={name}", flags["false"]], tmp_path / name)
        for name in ("adamw", "adamw8bit")
    }
    assert wanted["adamw"] != wanted["adamw8bit"]
    for number, sweep in enumerate(
        (
            ["optimizer=adamw8bit,adamw", "+trainer.full_determinism=true,false"],
            ["+trainer.full_determinism=false,true", "optimizer=adamw,adamw8bit"],
        )
    ):
        assert cli("-m", *tiny_sweep, *sweep, f"hydra.sweep.dir=order{number}").status == 0
        for name, found in wanted.items():
            (folder,) = (tmp_path / f"order{number}").glob(f"optimizer-{name}_full_determinism-false_*")
            assert trained(folder) == found, f"{name} in order {number}"


def test_what_a_job_changes_of_the_process_is_put_back(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.optim import GlobalOptimManager
    from transformers.utils import logging as transformers_logging

    from loraplus_hydra.io.quiet_libraries import quiet_libraries
    from loraplus_hydra.runs import job

    seen: list[dict[str, Any]] = []

    def state() -> dict[str, Any]:
        return {
            "environment": dict(os.environ),
            "folder": Path.cwd(),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
            "gradients": torch.is_grad_enabled(),
            "device": torch.get_default_device(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "logging": transformers_logging.get_verbosity(),
            "warnings": list(warnings.filters),
            "python": random.getstate(),
            "torch": torch.get_rng_state().tolist(),
            "overrides": dict(GlobalOptimManager.get_instance().pid2config),
        }

    def messing_up(*arguments: Any) -> Any:
        seen.append(state())
        os.environ["LEFT_BEHIND"] = "1"
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")
        torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        transformers_logging.set_verbosity(logging.CRITICAL)
        warnings.simplefilter("ignore")
        random.seed(9)
        GlobalOptimManager.get_instance().override_config(torch.nn.Parameter(torch.zeros(1)), "optim_bits", 32)
        raise RuntimeError("that was enough")

    quiet_libraries()  # once for the process, not for a job
    before = state()
    monkeypatch.setattr(job, "train", messing_up)
    assert cli("-m", *tiny_sweep, "loraplus.ratio=1,2").status == 1
    after = state()
    # imports set some of the environment, and use Python's generator
    assert {key for key in before if before[key] != after[key]} <= {"environment", "python"}
    added = after["environment"].keys() - before["environment"].keys()
    assert "LEFT_BEHIND" not in added
    assert set(seen[0]["environment"].items()) ^ set(seen[1]["environment"].items()) == set()
    assert [key for key in seen[0] if seen[0][key] != seen[1][key]] == []


def test_failed_job_is_freed_before_the_next_begins(
    cli: Cli, tiny_sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.runs import job

    models: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def failing(trainer: Any, *rest: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        models.append(weakref.ref(trainer.model))
        try:
            raise ValueError("inside")
        except ValueError as error:
            raise RuntimeError("outside") from error

    monkeypatch.setattr(job, "train", failing)
    gc.disable()  # nobody else collects
    try:
        assert cli("-m", *tiny_sweep, "seed=1,2,3").status == 1
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_jobs(cli: Cli, tiny_sweep: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplus_hydra.io import job_status

    resident: list[int] = []
    write = job_status.write

    def writing(sweep: Path, start: str, status: job_status.JobStatus) -> None:
        write(sweep, start, status)
        if status.status == job_status.DONE:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    monkeypatch.setattr(job_status, "write", writing)
    assert cli("-m", *tiny_sweep, "seed=range(10)").status == 0
    assert len(resident) == 10
    assert resident[9] < 1.1 * resident[1], [size >> 20 for size in resident]
