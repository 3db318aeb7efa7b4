"""Jobs of a process that begin alike are evaluated once before training, and are the same runs as alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from trl import SFTTrainer

from loraplus_hydra.runs.job import run
from loraplus_hydra.tasks import sft
from loraplus_hydra.training.hf_trainer import start_evaluation
from loraplus_hydra.training.hf_trainer.resumable_mixin import ResumableMixin
from tests.support.tiny import chat_tokenizer, save_llama, write_jsonl

DROPOUT = ["adapter.lora_dropout=0.3", "task.samples=0"]  # draws random numbers at each step
MACHINE = ("runtime", "per_second", "seconds", "memory_bytes")


@pytest.fixture
def before_training(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has, for each batch that a model predicts before its first step, a one."""
    predicted: list[int] = []
    original = ResumableMixin.prediction_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 0:
            predicted.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ResumableMixin, "prediction_step", counted)
    return predicted


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without what is measured of the machine."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(MACHINE)} for line in found]


@pytest.mark.parametrize("more", [[], ["trainer.ema=0.9"], ["optimizer=schedulefree_adamw", "scheduler=constant"]])
def test_jobs_with_other_rates_are_evaluated_once_and_train_as_alone(
    more: list[str],
    tiny_run: list[str],
    compose: Callable[..., Any],
    tmp_path: Path,
    before_training: list[int],
) -> None:
    if "optimizer=schedulefree_adamw" in more:
        pytest.importorskip("schedulefree")
    words = [*tiny_run, *DROPOUT, *more]
    rates = ["optimizer.lr=1e-2", "loraplus.ratio=2"]
    first = run(compose(*words), tmp_path / "first")
    once = len(before_training)
    second = run(compose(*words, *rates), tmp_path / "second")
    assert once > 0
    assert len(before_training) == once
    assert first.metrics_before == second.metrics_before
    start_evaluation._known.clear()
    alone = run(compose(*words, *rates), tmp_path / "alone")
    assert len(before_training) == 2 * once
    assert lines(tmp_path / "second") == lines(tmp_path / "alone")
    assert second.metrics["eval_loss"] == alone.metrics["eval_loss"]
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("second", "alone"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "adapter.r=4",
        "data.eval_fraction=0.3",
        "trainer.per_device_eval_batch_size=3",
        "task.args.max_length=6",
    ],
)
def test_jobs_that_begin_otherwise_are_evaluated(
    change: str, tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, before_training: list[int]
) -> None:
    run(compose(*tiny_run, *DROPOUT), tmp_path / "first")
    once = len(before_training)
    run(compose(*tiny_run, *DROPOUT, change), tmp_path / "second")
    assert len(before_training) > once


def test_other_rows_or_weights_at_the_same_place_are_evaluated(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, before_training: list[int]
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(40)])
    base = save_llama(tmp_path / "base", chat_tokenizer())
    words = [*tiny_run, *DROPOUT, f"data.train={rows}", f"model.path={base}", "trainer.max_steps=1"]
    losses = []
    for place, change in enumerate(("nothing", "rows", "weights")):
        if change == "rows":
            write_jsonl(rows, [{"prompt": f"say {i}", "completion": f" {i + 1}"} for i in range(40)])
        elif change == "weights":
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(base)
            model.lm_head.weight.data.mul_(3)
            model.save_pretrained(base)
        losses.append(run(compose(*words), tmp_path / str(place)).metrics_before["eval_loss"])
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    "change",
    [
        "task._target_=tests.training.test_start_evaluation.OwnTrainer",
        "task.examples=tests.training.test_start_evaluation.examples",
        "model.trust_remote_code=true",
    ],
)
def test_own_code_is_evaluated_each_time(
    change: str, tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, before_training: list[int]
) -> None:
    counts = []
    for place in ("first", "second"):
        run(compose(*tiny_run, "task.samples=0", change), tmp_path / place)
        counts.append(len(before_training))
    assert counts[1] == 2 * counts[0] > 0


class OwnTrainer(SFTTrainer):  # type: ignore[misc]
    """A Trainer class of one's own."""


@functools.wraps(sft.examples)
def examples(*args: Any, **kwargs: Any) -> Any:
    return sft.examples(*args, **kwargs)
