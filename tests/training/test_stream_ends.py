"""The end of a stream: its last batches, if they fill no step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from tests.support.forking import lines
from tests.support.tiny import write_jsonl


def test_rest_of_a_stream_is_added_to_no_step(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty rows are five batches of four: two steps of two batches, and one batch that fills no step."""
    rows = [{"prompt": f"say {n}", "completion": f" {n}"} for n in range(20)]
    path, held_out = write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "eval.jsonl", rows[:4])
    streamed = ["data.streaming=true", f"data.train={path}", f"data.eval={held_out}", "optimizer.lr=1e-12"]
    with caplog.at_level("INFO"):
        run(compose(*tiny_run, *streamed, "trainer.gradient_accumulation_steps=2"), tmp_path / "run")
    steps = [line for line in lines(tmp_path / "run") if "grad_norm" in line]
    losses = [line["loss"] for line in steps]
    assert len(losses) == 4
    assert losses == pytest.approx([losses[0]] * 4, rel=0.1)
    assert caplog.text.count("the last 1 of the stream's batches") == 1
