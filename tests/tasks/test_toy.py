"""The toy: the student learns as in theory, and a sweep shows the paper's result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.runs.job import run
from loraplus_hydra.tasks.toy.student import AutoStudent, StudentConfig
from tests.conftest import Finished

Losses = Callable[..., dict[tuple[float, float], float]]


def toy(*words: str) -> list[str]:
    return ["experiment=toy", "trainer.eval_strategy=no", "trainer.logging_steps=1000", *words]


@pytest.mark.parametrize("start", ["a_zero", "true"])
def test_student_learns_as_adam_does_on_the_exact_gradient(
    start: str, compose: Callable[..., Any], tmp_path: Path
) -> None:
    config = compose(
        *toy("data.width=24", "data.steps=15", f"adapter.init_lora_weights={start}", "loraplus.ratio=30", "seed=5")
    )
    result = run(config, tmp_path / "run")
    assert result.status == "ok"

    set_seed(5)
    student = AutoStudent.from_pretrained(config=StudentConfig(width=24, rank=4, seed=0))
    change = (student.outputs.weight[:24] / 24**0.5).T  # dW
    assert torch.linalg.matrix_rank(change) == 4
    layer = add_adapter(student, config.adapter, None).base_model.model.layer
    A = layer.lora_A["default"].weight.detach().clone()
    B = layer.lora_B["default"].weight.detach().clone()
    assert (A.abs().max() == 0, B.abs().max() == 0) == (start == "a_zero", start == "true")
    optimizer = torch.optim.Adam([{"params": [A], "lr": 1e-3}, {"params": [B], "lr": 3e-2}])
    for _ in range(15):
        error, size = B @ A - change, change.square().sum()
        A.grad, B.grad = 2 * B.T @ error / size, 2 * error @ A.T / size
        optimizer.step()
    learnt = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, tensor in learnt.items():
        torch.testing.assert_close(tensor, A if ".lora_A." in name else B, rtol=1e-3, atol=1e-5)
    left = float((B @ A - change).square().sum() / change.square().sum())
    assert result.metrics["eval_loss"] == pytest.approx(left, rel=1e-3)
    assert 10 ** result.metrics["eval_log10_loss"] == pytest.approx(result.metrics["eval_loss"])
    assert result.metrics_before["eval_loss"] == pytest.approx(1, abs=1e-6)


@pytest.fixture
def losses(compose: Callable[..., Any], tmp_path: Path) -> Losses:
    """Return the error after training at each pair of rates."""

    def at(start: str, width: int, pairs: list[tuple[float, float]]) -> dict[tuple[float, float], float]:
        found = {}
        for lr_A, lr_B in pairs:
            words = [f"data.width={width}", f"adapter.init_lora_weights={start}"]
            rates = ["loraplus=absolute", f"loraplus.lr_A={lr_A}", f"loraplus.lr_B={lr_B}"]
            found[lr_A, lr_B] = run(compose(*toy(*words, *rates)), tmp_path / f"{start}-{width}-{lr_A}-{lr_B}").metrics[
                "eval_loss"
            ]
        return found

    return at


DIAGONAL = [(1e-3, 1e-3), (1e-2, 1e-2), (1e-1, 1e-1)]


def gain(found: dict[tuple[float, float], float]) -> float:
    """Return the smallest error at equal rates, divided by the smallest of all."""
    return min(found[pair] for pair in DIAGONAL) / min(found.values())


def test_with_a_zero_a_large_ratio_wins_and_gains_more_at_large_width(losses: Losses) -> None:
    gains = [gain(losses("a_zero", width, [*DIAGONAL, (1e-3, 1e-1), (1e-3, 1.0)])) for width in (64, 256)]
    assert gains[0] > 2
    assert gains[1] > 10 * gains[0]


@pytest.mark.slow
def test_with_b_zero_a_ratio_gains_little(losses: Losses) -> None:
    found = losses("true", 256, [*DIAGONAL, (1e-3, 1e-1), (1e-2, 1e-1), (1e-1, 1e-2), (1.0, 1e-2)])
    best = min(found, key=lambda pair: found[pair])
    assert best[1] / best[0] <= 1
    assert gain(found) < 3


def test_toy_sweep_draws_the_map_of_both_rates(cli: Callable[..., Finished], tmp_path: Path) -> None:
    grid = ["loraplus.lr_A=1e-3,1e-1", "loraplus.lr_B=1e-3,1e-1"]
    finished = cli("hparams_search=toy", *grid, "data.width=32", "data.steps=20")
    assert finished.status == 0, finished.err
    assert "4 jobs: 4 done" in finished.out
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert {"heatmap.png", "report.html", "results.csv", "curves.png"} <= {path.name for path in folder.iterdir()}
    for job in folder.glob("lr_A-*"):
        groups = json.loads((job / "param_groups.json").read_text())
        assert [group["role"] for group in groups] == ["lora_A", "lora_B"]


def test_width_beyond_the_tables_is_an_error(compose: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"data\.width: 4096 is out of range"):
        run(compose(*toy("data.width=4096")), tmp_path / "run")
