"""At a rung, the average of the weights is compared: by a closed formula, and the same one after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplus_hydra.io.rungs import read_rungs
from loraplus_hydra.runs.job import run
from loraplus_hydra.training.hf_trainer import average, rung
from loraplus_hydra.training.hf_trainer.average import AverageCallback

FILE = "rung_average.safetensors"
WORDS = ["trainer.max_steps=16", "task.samples=0", "trainer.eval_strategy=no", "data.eval_fraction=0.5"]


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Has the trained tensors after each step."""
    found: list[dict[str, torch.Tensor]] = []
    original = AverageCallback.on_optimizer_step

    def recorded(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        model = self.trainer.model
        found.append({name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad})

    monkeypatch.setattr(AverageCallback, "on_optimizer_step", recorded)
    return found


def test_the_average_weighs_late_steps_most(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, weights: list[dict[str, torch.Tensor]]
) -> None:
    run(compose(*tiny_run, *WORDS), tmp_path, stop_at=0.5)
    assert len(weights) == 8
    # The weight of step s in the average after t steps is 4 s (s + 1) (s + 2) / (t (t + 1) (t + 2) (t + 3))
    shares = [4 * s * (s + 1) * (s + 2) / (8 * 9 * 10 * 11) for s in range(1, 9)]
    assert sum(shares) == pytest.approx(1)
    stored = load_file(tmp_path / "checkpoints" / "checkpoint-8" / FILE)
    assert stored.keys() == weights[-1].keys()
    for name, tensor in stored.items():
        by_hand = sum(share * step[name].double() for share, step in zip(shares, weights, strict=True))
        torch.testing.assert_close(tensor.double(), by_hand, rtol=1e-5, atol=1e-8)


def test_a_job_that_waited_at_an_earlier_rung_has_the_same_losses_at_the_next(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    words = [*tiny_run, *WORDS]
    run(compose(*words), tmp_path / "unbroken", stop_at=0.5)
    run(compose(*words), tmp_path / "waited", stop_at=0.25)
    resumed = compose(*words, "trainer.resume_from_checkpoint=auto")
    run(resumed, tmp_path / "waited", stop_at=0.5)
    ours, theirs = (read_rungs(tmp_path / name)[-1] for name in ("waited", "unbroken"))
    assert ours == theirs
    assert ours.step == 8


def test_jobs_at_one_step_are_compared_on_the_same_rows_whatever_share_was_asked(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rung at 1/16 of 16 steps is at step 6, because no rung is earlier."""
    shares: list[float] = []

    def row_losses(_: Any, share: float) -> Any:
        shares.append(share)
        return (1.0,), (1.0,), None

    monkeypatch.setattr(rung, "_row_losses", row_losses)
    for stop_at in (1 / 16, 6 / 16):
        run(compose(*tiny_run, *WORDS), tmp_path / str(stop_at), stop_at=stop_at)
    assert shares == [6 / 16, 6 / 16]


def test_the_last_step_is_compared_without_an_average(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average.Average, "in_model", lambda _: pytest.fail("the average was compared"))
    result = run(compose(*tiny_run, *WORDS), tmp_path, stop_at=1.0)
    assert read_rungs(tmp_path)[-1].loss == pytest.approx(result.metrics["eval_loss"])


def test_adalora_is_compared_without_an_average(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    run(compose(*tiny_run, *WORDS, "adapter=adalora"), tmp_path, stop_at=0.5)
    assert read_rungs(tmp_path)[-1].step == 8
    assert not list(tmp_path.rglob(FILE))
