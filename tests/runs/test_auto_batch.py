"""The largest batch that fits, with as many rows a step as before."""

from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from loraplus_hydra import run
from loraplus_hydra.config.identity import run_hash
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.runs import batch
from tests.conftest import Finished

AUTO = "trainer.auto_batch=true"


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Let batches of at most so many rows fit; return the list of those that are tried."""

    def limit(most: int) -> list[int]:
        tried: list[int] = []

        def fits(config: Any) -> bool:
            tried.append(config.trainer.per_device_train_batch_size)
            return tried[-1] <= most

        monkeypatch.setattr(batch, "_fits", fits)
        monkeypatch.setattr(batch, "_estimate", lambda _: None)
        return tried

    return limit


def test_run_is_the_one_with_the_same_batch_set_by_hand(
    fits: Any, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    tried = fits(2)
    run(compose(*tiny_run, AUTO, "trainer.per_device_train_batch_size=8"), tmp_path / "found")
    assert tried == [8, 4, 2]
    rows = ("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4")
    run(compose(*tiny_run, *rows), tmp_path / "by hand")
    assert losses(tmp_path / "found") == losses(tmp_path / "by hand")
    stored = OmegaConf.load(tmp_path / "found" / "config.yaml").trainer
    assert (stored.per_device_train_batch_size, stored.gradient_accumulation_steps) == (2, 4)


def test_resumed_run_keeps_its_batch(
    fits: Any, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    fits(2)
    asked = [*tiny_run, AUTO, "trainer.per_device_train_batch_size=8", "trainer.save_steps=2"]
    run(compose(*asked), tmp_path / "run")
    tried = fits(8)
    resumed = compose(*asked, "trainer.max_steps=6", "trainer.resume_from_checkpoint=auto")
    assert run(resumed, tmp_path / "run").steps == 6
    assert tried == []
    assert run_hash(compose(*asked)) == run_hash(
        compose(*asked, "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4")
    )


def test_rows_that_cannot_be_divided_are_reported(
    fits: Any, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loraplus_hydra")
    fits(6)
    run(compose(*tiny_run, AUTO, "trainer.per_device_train_batch_size=7"), tmp_path / "run")
    assert "    Batch: 1 x 7 batches = 7 rows a step (trainer.auto_batch)" in caplog.messages
    assert "    7 rows can't be divided into equal batches of 2 to 6 rows" in caplog.messages


def test_nothing_fits_is_an_error_with_remedies(
    fits: Any, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    fits(0)
    with pytest.raises(UserError, match=r"not even one row fits .* trainer\.activation_checkpointing=true"):
        run(compose(*tiny_run, AUTO), tmp_path / "run")


def test_estimate_above_the_free_memory_is_not_tried(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(
        batch, "_fits", lambda config: bool(tried.append(config.trainer.per_device_train_batch_size) or 1)
    )
    monkeypatch.setattr(batch, "available_memory_bytes", lambda **_: 10_000_000)
    run(compose(*tiny_run, AUTO, "trainer.per_device_train_batch_size=4096", "trainer.max_steps=1"), tmp_path / "run")
    assert len(tried) == 1
    assert tried[0] < 4096


@pytest.mark.slow
def test_batch_is_found_under_a_limit_of_the_address_space(tiny_run: list[str], tmp_path: Path) -> None:
    words = [
        "trainer.per_device_train_batch_size=256",
        "trainer.forward=plain",
        "task.samples=0",
        "trainer.max_steps=2",
    ]
    common = [*words, "data.max_samples=256", "trainer.eval_strategy=no", "trainer.logging_steps=1"]

    def train(*arguments: str) -> None:
        command = [sys.executable, "-m", "loraplus_hydra", *common, *arguments]
        limit = 6 * 2**30
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        assert done.returncode == 0, done.stderr

    train(AUTO, "hydra.run.dir=found")
    found = OmegaConf.load(tmp_path / "found" / "config.yaml").trainer
    rows = (found.per_device_train_batch_size, found.gradient_accumulation_steps)
    assert rows[0] * rows[1] == 256
    assert rows[0] < 256
    names = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
    train(*(f"{name}={number}" for name, number in zip(names, rows, strict=True)), "hydra.run.dir=by_hand")
    assert losses(tmp_path / "found") == losses(tmp_path / "by_hand")


def test_several_processes_are_refused(cli: Any, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused: Finished = cli("check", *tiny_run, AUTO)
    assert refused.status == 1
    assert "trainer.auto_batch" in refused.err


def test_ctrl_c_in_a_trial_is_no_failed_trial(
    compose: Callable[..., Any], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        interrupts.request(signal.SIGINT)
        return subprocess.CompletedProcess(command, 1, "", "KeyboardInterrupt")

    monkeypatch.setattr(subprocess, "run", stopped)
    try:
        with interrupts.kept_signals(deliver=False), pytest.raises(KeyboardInterrupt):
            batch._fits(compose(*tiny_run))
    finally:
        interrupts.forget()
