"""The lean forward on a GPU: the plain forward's numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and -m gpu"),
]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ([], 1e-5),
        (["model.dtype=bfloat16"], 2e-2),
        (["quantization=nf4", "model.dtype=bfloat16"], 2e-2),
    ],
)
def test_a_run_has_the_plain_forward_s_losses(
    compose: Callable[..., Any],
    tmp_path: Path,
    changes: list[str],
    tolerance: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shared = ["data.max_samples=64", "trainer.max_steps=6", "trainer.logging_steps=1", "task.samples=0"]
    losses = {}
    caplog.set_level(logging.INFO, logger="loraplus_hydra")
    for forward in ("lean", "plain", "auto"):
        run(compose(*shared, *changes, f"trainer.forward={forward}"), tmp_path / forward)
        lines = (tmp_path / forward / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        losses[forward] = [each[name] for each in metrics for name in ("loss", "eval_loss") if name in each]

    assert "Forward pass: lean, without padding" in caplog.text
    assert "not faster on the GPU that was measured" in caplog.text
    assert len(losses["lean"]) > 6
    assert losses["lean"] == pytest.approx(losses["plain"], rel=tolerance)
    assert losses["auto"] == pytest.approx(losses["plain"], rel=tolerance)
