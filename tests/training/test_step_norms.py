"""The norms in metrics.jsonl are those of the weights and of what a step did to them, and cost the run nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import TrainerControl
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from loraplus_hydra import run
from loraplus_hydra.training.hf_trainer import callbacks
from loraplus_hydra.training.step_norms import StepNorms, may_be_logged
from tests.support.processes import run_in_two_ranks
from tests.support.step_norms_worker import write_norms

WEIGHTS = "adapter_model.safetensors"


def training_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def norm_of(tensors: list[np.ndarray]) -> float:
    return float(np.sqrt(sum((tensor.astype(np.float64) ** 2).sum() for tensor in tensors)))


# More than 4,096 numbers a tensor, so that the 8-bit optimizer has 8-bit state.
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_norms_are_those_of_the_weights_on_disk(
    optimizer: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [
        *(f"optimizer={optimizer}", "optimizer.lr=1e-2", "optimizer.weight_decay=0.1", "adapter.r=160"),
        *("adapter=dora", "trainer.gradient_accumulation_steps=2", "trainer.max_grad_norm=0.1"),
        *("trainer.save_steps=1", "trainer.save_total_limit=null", "task.samples=0"),
    ]
    run(compose(*tiny_run, *overrides), tmp_path / "run")
    placed = json.loads((tmp_path / "run" / "param_groups.json").read_text())
    group_of = {row["name"].replace(".default", "").removesuffix(".weight"): row["group"] for row in placed}
    assert len(set(group_of.values())) == 3
    saved = [load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / WEIGHTS) for step in range(1, 5)]
    lines = training_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, old, new in zip(lines[1:], saved, saved[1:], strict=False):
        for group, told in line["norms"].items():
            names = [name for name in new if group_of[name.removesuffix(".weight")] == group]
            assert told["weight"] == pytest.approx(norm_of([new[name] for name in names]), rel=1e-5)
            changes = [new[name].astype(np.float64) - old[name] for name in names]
            assert told["update"] == pytest.approx(norm_of(changes), rel=1e-4)
            assert told["update"] > 0
        assert set(line["norms"]) == set(line["lr"])
    # lora_B starts at zero: at the first step no gradient reaches lora_A, and its change is the decay alone
    assert lines[0]["norms"]["groupA"]["update"] < lines[1]["norms"]["groupA"]["update"]


def test_first_step_moves_b_alone(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    run(compose(*tiny_run, "task.samples=0", "trainer.max_steps=1"), tmp_path / "run")
    (line,) = training_lines(tmp_path / "run")
    assert line["norms"]["groupA"]["update"] == 0
    assert line["norms"]["groupB"]["update"] == line["norms"]["groupB"]["weight"] > 0


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw8bit", marks=pytest.mark.slow)])
def test_training_is_the_same_to_the_bit_without_them(
    optimizer: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(*tiny_run, f"optimizer={optimizer}", "adapter.r=160", "adapter.lora_dropout=0.1", "task.samples=0")
    run(config, tmp_path / "with")
    monkeypatch.setattr(callbacks, "may_be_logged", lambda *_: False)
    run(config, tmp_path / "without")
    losses = []
    for name in ("with", "without"):
        lines = training_lines(tmp_path / name)
        assert all(("norms" in line) == (name == "with") for line in lines)
        losses.append([line["loss"] for line in lines])
    assert losses[0] == losses[1]
    adapters = [(tmp_path / name / "adapter" / WEIGHTS).read_bytes() for name in ("with", "without")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("overrides", "logged"),
    [
        (["trainer.logging_steps=3", "trainer.max_steps=7"], [1, 3, 6]),
        (["trainer.logging_steps=3", "trainer.logging_first_step=false", "trainer.max_steps=4"], [3]),
        # 36 rows in batches of 4 are 9 batches: an epoch of 5 steps, the last of one batch
        (
            [
                *("+trainer.logging_strategy=epoch", "trainer.logging_first_step=false", "trainer.max_steps=12"),
                *("trainer.gradient_accumulation_steps=2", "trainer.eval_strategy=no"),
            ],
            [5, 10, 12],
        ),
        (["+trainer.logging_strategy=no", "trainer.logging_first_step=false"], []),
    ],
)
def test_only_steps_that_are_logged_are_measured(
    overrides: list[str],
    logged: list[int],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    original = callbacks.StepNorms

    def counted(*arguments: Any) -> StepNorms:
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(callbacks, "StepNorms", counted)
    run(compose(*tiny_run, "task.samples=0", "data.eval_fraction=0.1", *overrides), tmp_path / "run")
    lines = training_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == logged
    assert all("norms" in line for line in lines)
    assert len(made) == len(logged)


@given(
    every=st.integers(1, 9), first=st.booleans(), strategy=st.sampled_from(["steps", "no"]), before=st.integers(0, 40)
)
def test_a_step_is_measured_when_the_trainer_logs_it(every: int, first: bool, strategy: str, before: int) -> None:
    arguments = SimpleNamespace(
        logging_first_step=first,
        logging_strategy=IntervalStrategy(strategy),
        eval_strategy=IntervalStrategy.NO,
        save_strategy=SaveStrategy.NO,
    )
    state = SimpleNamespace(global_step=before, logging_steps=every, max_steps=100)
    told = may_be_logged(arguments, state, None)
    state.global_step += 1
    control = DefaultFlowCallback().on_step_end(arguments, state, TrainerControl())
    assert told == control.should_log


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_are_those_of_a_loop_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((64, 3), (5,), (2, 3, 4))]
    groups = [{"name": "one", "params": parameters[:2], "lr": 0.1}, {"name": "other", "params": parameters[2:]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        old = [parameter.detach().double().numpy().copy() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        before = StepNorms(optimizer, torch.nn.Module())
        optimizer.step()
        told = before.norms()
        new = [parameter.detach().double().numpy() for parameter in parameters]
        for name, part in (("one", slice(0, 2)), ("other", slice(2, 3))):
            assert told[name]["weight"] == pytest.approx(norm_of(new[part]), rel=1e-6)
            changes = [b - a for a, b in zip(old[part], new[part], strict=True)]
            assert told[name]["update"] == pytest.approx(norm_of(changes), rel=1e-5)


def test_norms_of_a_wrapped_model_are_over_all_shards(tmp_path: Path) -> None:
    ended = run_in_two_ranks(write_norms, str(tmp_path), folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    for how in ("ddp", "fsdp1", "fsdp2"):
        for rank in (0, 1):
            wrapped, plain = json.loads((tmp_path / f"{how}-{rank}.json").read_text())
            for group, told in plain.items():
                assert wrapped[group] == pytest.approx(told, rel=1e-5), (how, rank)
                assert told["update"] > 0
