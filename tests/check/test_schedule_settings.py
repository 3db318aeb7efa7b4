"""The check of the scheduler group: what a run would accept passes, and no length is named that the run hasn't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraplus_hydra.check.classes import class_problems
from loraplus_hydra.config.plain import plain_of


def problems(compose: Callable[..., Any], *overrides: str) -> list[str]:
    found = class_problems(plain_of(compose(*overrides)))
    return [str(each) for each in found if each.key.startswith("scheduler")]


@pytest.mark.parametrize(
    ("optimizer", "lr_end", "is_valid"),  # valid if lr_end is below optimizer.lr
    [
        (["optimizer.lr=5e-5"], "1e-4", False),
        (["optimizer.lr=5e-5"], "1e-5", True),
        (["optimizer=sgd"], "2e-3", True),
        (["optimizer=sgd"], "0.2", False),
    ],
)
def test_the_end_of_a_schedule_is_compared_with_the_run_s_own_rate(
    optimizer: list[str], lr_end: str, is_valid: bool, compose: Callable[..., Any]
) -> None:
    found = problems(compose, *optimizer, "scheduler=polynomial", f"scheduler.lr_end={lr_end}")
    assert (not found) is is_valid, found
    if found:
        assert "must be smaller than initial lr" in found[0]
        assert "num_training_steps" not in found[0]


WARMUP = ["scheduler.warmup_ratio=0", "scheduler.decay_ratio=0"]


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "is_valid"),  # valid if both fit the run, or if its length is not known yet
    [
        (-1, 200, 0, True),
        (-1, 200, 5000, True),
        (-1, 200.0, 0, True),
        (-1, 10**9, 10**9, True),
        (20000, 0, 2000, True),
        (20000, 18000, 2000, True),
        (20000, 18001, 2000, False),
        (10**9, 10**8, 10**8, True),
        (50, 30, 20, True),
        (50, 30, 21, False),
    ],
)
def test_numbers_of_steps_are_compared_with_the_run_s_own_length(
    steps: int, warmup: float, decay: int, is_valid: bool, compose: Callable[..., Any]
) -> None:
    phases = [f"scheduler.num_warmup_steps={warmup}", f"scheduler.num_decay_steps={decay}"]
    found = problems(compose, "scheduler=wsd", *WARMUP, *phases, f"trainer.max_steps={steps}")
    assert (not found) is is_valid, found
    if found:
        assert f"{warmup} steps of warm-up and {decay} of decay are more than the run's {steps} steps" in found[0]


@pytest.mark.parametrize("steps", [-1, 20000])
def test_phases_given_twice_or_as_parts_of_steps_are_found_for_every_length(
    steps: int, compose: Callable[..., Any]
) -> None:
    base = ["scheduler=wsd", f"trainer.max_steps={steps}"]
    assert "twice" in problems(compose, *base, "scheduler.num_warmup_steps=2")[0]
    assert "is a number of steps" in problems(compose, *base, *WARMUP, "scheduler.num_warmup_steps=2.5")[0]
