"""Runs under the lean forward that are killed or cut off, and resumed under the same or the plain forward."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from tests.support.forking import lines
from tests.support.lean import assert_equal_within

Compose = Callable[..., Any]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("first", "then"), [("lean", "lean"), ("plain", "lean"), pytest.param("lean", "plain", marks=slow)]
)
def test_a_run_resumes_from_a_checkpoint_of_either_forward(
    compose: Compose, tiny_run: list[str], uneven: list[str], tmp_path: Path, first: str, then: str
) -> None:
    """Under one forward to the bits of the unbroken run, with dropout; under another to its numbers, without."""
    dropout = "adapter.lora_dropout=0.1" if first == then else "adapter.lora_dropout=0.0"
    shared = [*tiny_run, *uneven, dropout, "trainer.max_steps=6", "trainer.save_steps=3", "trainer.eval_steps=2"]
    whole = tmp_path / "whole"
    run(compose(*shared, f"trainer.forward={first}"), whole)

    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for path in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(cut / path)
    (cut / "result.json").unlink()
    run(compose(*shared, f"trainer.forward={then}", "trainer.resume_from_checkpoint=auto"), cut)

    if first == then:
        name = "adapter/adapter_model.safetensors"
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
        assert lines(cut) == lines(whole)
    else:
        for one, other in zip(lines(cut), lines(whole), strict=True):
            one.pop("norms", None), other.pop("norms", None)
            assert_equal_within(one, other, 2e-6)


@slow
def test_a_killed_run_resumes_to_the_bits_of_the_unbroken_one(
    compose: Compose, tiny_run: list[str], uneven: list[str], tmp_path: Path
) -> None:
    dropout = ["adapter.lora_dropout=0.2", "trainer.forward=lean"]
    shared = [
        *tiny_run,
        *uneven,
        *dropout,
        "trainer.max_steps=60",
        "trainer.save_steps=4",
        "trainer.save_total_limit=1",
    ]
    run(compose(*shared), tmp_path / "whole")

    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "loraplus_hydra", *shared, f"hydra.run.dir={cut}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(cut.glob("checkpoints/checkpoint-*/manifest.json")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (cut / "result.json").is_file(), "the run was over before it was killed"
    run(compose(*shared, "trainer.resume_from_checkpoint=auto"), cut)

    name = "adapter/adapter_model.safetensors"
    assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert lines(cut) == lines(tmp_path / "whole")
