"""Schedules: every group's rate moves by the same factor at every step, or the schedule is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from transformers import optimization

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.schedule import build_schedule, falls, highest_rate_step, one_cycle
from tests.support.presets import CONF, arguments

SCHEDULES = sorted(path.stem for path in (CONF / "scheduler").glob("*.yaml"))


def optimizer_at(*rates: float, lr: float | None = None, cls: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": rate, "name": f"group{i}"} for i, rate in enumerate(rates)
    ]
    return cls(groups, lr=rates[0] if lr is None else lr)


def rates_of(schedule: Any, steps: int) -> list[list[float]]:
    """The rates of all groups at each step, the first one's before any."""
    found = []
    for _ in range(steps + 1):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


def from_yaml(name: str, optimizer: torch.optim.Optimizer, steps: int, **changes: Any) -> Any:
    keys = {**arguments("scheduler", name), **changes}
    return build_schedule(locate(keys.pop("_target_")), optimizer, num_training_steps=steps, kwargs=keys)


def test_the_documented_schedules_are_there() -> None:
    assert set(SCHEDULES) == {
        *(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_min_lr",
            "polynomial",
            "one_cycle",
            "wsd",
        ),
    }


@pytest.mark.parametrize("name", SCHEDULES)
@given(
    rates=st.lists(st.floats(1e-6, 1e-1), min_size=2, max_size=4),
    steps=st.integers(1, 60),
    warmup=st.floats(0, 1),
)
def test_the_ratio_holds_at_every_step(name: str, rates: list[float], steps: int, warmup: float) -> None:
    changes: dict[str, Any] = {"warmup_ratio": warmup} if "warmup_ratio" in arguments("scheduler", name) else {}
    if name == "wsd":
        changes["decay_ratio"] = (1 - warmup) / 2
    if name == "polynomial":
        changes["lr_end"] = rates[0] / 100
    for row in rates_of(from_yaml(name, optimizer_at(*rates), steps, **changes), steps):
        for (rate, base), (other, other_base) in itertools.combinations(zip(row, rates, strict=True), 2):
            assert rate * other_base == pytest.approx(other * base, rel=1e-9, abs=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_starts_peaks_and_ends_where_it_says(name: str) -> None:
    factors = [row[0] for row in rates_of(from_yaml(name, optimizer_at(1.0, 8.0), 100), 100)]
    first = {"constant": 1, "linear": 1, "one_cycle": 1 / 25}.get(name, 0)
    last = {
        "constant": 1,
        "constant_with_warmup": 1,
        "cosine_with_min_lr": 0.1,
        "one_cycle": 1 / 25 / 1e4,
        "polynomial": 1e-7,
    }.get(name, 0)
    assert factors[0] == pytest.approx(first)
    assert max(factors) == pytest.approx(1)
    assert factors[100] == pytest.approx(last)


# warm-up and decay lengths


@pytest.mark.parametrize(
    ("kwargs", "warmup"),
    [
        ({}, 0),
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_ratio": 0.101}, 11),
        ({"num_warmup_steps": 7}, 7),
        ({"warmup_ratio": 0.0, "num_warmup_steps": 7}, 7),
    ],
)
def test_warm_up_is_a_share_rounded_up_or_a_number_of_steps(kwargs: dict[str, Any], warmup: int) -> None:
    ours = build_schedule(
        optimization.get_linear_schedule_with_warmup, optimizer_at(1.0, 8.0), num_training_steps=100, kwargs=kwargs
    )
    theirs = optimization.get_linear_schedule_with_warmup(optimizer_at(1.0, 8.0), warmup, 100)
    assert rates_of(ours, 100) == rates_of(theirs, 100)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"warmup_ratio": 0.1, "num_warmup_steps": 3}, "set the same thing twice"),
        ({"warmup_ratio": 1.5}, "from 0 to 1, got 1.5"),
        ({"warmup_ratio": -0.1}, "0 or more"),
        ({"num_warmup_steps": 2.5}, "is a number of steps, got 2.5"),
        ({"num_warmup_steps": "3"}, "must be a number"),
        ({"warmup_ratio": float("nan")}, "must be a number"),
        ({"num_warm_up_steps": 3}, "takes no argument 'num_warm_up_steps' (did you mean 'num_warmup_steps'?)"),
        ({"decay_ratio": 0.1}, "has no argument num_decay_steps"),
    ],
)
def test_wrong_lengths_and_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_schedule(
            optimization.get_linear_schedule_with_warmup, optimizer_at(1.0), num_training_steps=10, kwargs=kwargs
        )
    assert message in str(caught.value)


def test_a_share_leaves_the_last_step_its_rate() -> None:
    """In a run of one step, warm-up rounded up to one would train at rate 0."""
    for name in ("cosine", "polynomial", "wsd"):
        assert rates_of(from_yaml(name, optimizer_at(1.0), 1), 1)[0] == [1.0]


def test_warm_up_and_decay_longer_than_the_run_are_refused() -> None:
    with pytest.raises(UserError, match="60 steps of warm-up and 50 of decay are more than the run's 100"):
        from_yaml("wsd", optimizer_at(1.0), 100, warmup_ratio=0, decay_ratio=0, num_warmup_steps=60, num_decay_steps=50)


def test_a_schedule_that_fails_at_its_last_step_is_refused_before_the_first() -> None:
    """transformers' polynomial divides by zero at the end of a run that is all warm-up."""
    with pytest.raises(UserError, match=r"fails at step 10: .*division by zero"):
        from_yaml("polynomial", optimizer_at(1.0), 10, warmup_ratio=0, num_warmup_steps=10)


def test_warm_up_for_a_schedule_without_is_refused() -> None:
    with pytest.raises(UserError, match="get_constant_schedule has no argument num_warmup_steps"):
        build_schedule(
            optimization.get_constant_schedule, optimizer_at(1.0), num_training_steps=10, kwargs={"warmup_ratio": 0.1}
        )


def test_what_the_schedule_itself_refuses_is_told() -> None:
    with pytest.raises(
        UserError, match=r"get_polynomial_decay.* refuses the arguments lr_end=2.*smaller than initial lr"
    ):
        build_schedule(
            optimization.get_polynomial_decay_schedule_with_warmup,
            optimizer_at(1.0),
            num_training_steps=10,
            kwargs={"lr_end": 2},
        )


# one cycle


@pytest.mark.parametrize("steps", [5, 100, 333])
@pytest.mark.parametrize("pct_start", [0.1, 0.3, 1.0])
def test_one_cycle_is_torch_s_with_a_peak_for_each_group(steps: int, pct_start: float) -> None:
    ours = rates_of(one_cycle(optimizer_at(1e-4, 8e-4), steps, pct_start=pct_start), steps - 1)
    optimizer = optimizer_at(1e-4, 8e-4)
    torch_s = lr_scheduler.OneCycleLR(
        optimizer, [1e-4, 8e-4], total_steps=steps, pct_start=pct_start, cycle_momentum=False
    )
    theirs = []
    for step in range(steps):
        theirs.append([group["lr"] for group in optimizer.param_groups])
        if step < steps - 1:
            optimizer.step()
            torch_s.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("kwargs", [{"pct_start": 1.5}, {"div_factor": 0}, {"final_div_factor": -1}])
def test_one_cycle_refuses_what_makes_no_cycle(kwargs: dict[str, float]) -> None:
    with pytest.raises(UserError, match="one_cycle refuses the arguments"):
        build_schedule(one_cycle, optimizer_at(1.0), num_training_steps=10, kwargs=kwargs)


# schedules by _target_


@pytest.mark.parametrize(
    ("factory", "kwargs", "message"),
    [
        (
            lr_scheduler.OneCycleLR,
            {"max_lr": 1e-3},
            "OneCycleLR doesn't keep the ratio.*at step 0 they are 4e-05 and 4e-05.*scheduler=one_cycle",
        ),
        (
            lr_scheduler.CosineAnnealingLR,
            {"eta_min": 1e-5},
            "CosineAnnealingLR doesn't keep the ratio.*at step 1 .*cosine_with_min_lr",
        ),
        (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 5, "eta_min": 1e-5}, "doesn't keep the ratio.*at step 1 "),
        (lr_scheduler.CyclicLR, {"base_lr": 1e-5, "max_lr": 1e-3}, "CyclicLR doesn't keep the ratio.*at step 0 "),
        (lr_scheduler.ReduceLROnPlateau, {}, "reacts to the loss"),
        (optimization.GreedyLR, {}, "reacts to the loss"),
        (lambda _: None, {}, "returns NoneType, which is not"),
        (
            lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda step: 1.0 / (step + 1)]),
            {},
            "at step 1 they are",
        ),
    ],
)
def test_a_schedule_that_breaks_the_ratio_is_refused_before_it_touches_the_optimizer(
    factory: Callable[..., Any], kwargs: dict[str, Any], message: str
) -> None:
    optimizer = optimizer_at(1e-4, 8e-4)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(UserError) as caught:
        build_schedule(factory, optimizer, num_training_steps=10, kwargs=kwargs)
    assert re.search(message, str(caught.value)), caught.value
    assert [dict(group) for group in optimizer.param_groups] == before


def test_a_ratio_that_breaks_late_is_found() -> None:
    class Late(lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float]:
            return [base if self.last_epoch < 9 or i else base / 2 for i, base in enumerate(self.base_lrs)]

    build_schedule(Late, optimizer_at(1.0, 8.0), num_training_steps=8, kwargs={})
    with pytest.raises(UserError, match=r"at step 9 they are 0\.5 and 8"):
        build_schedule(Late, optimizer_at(1.0, 8.0), num_training_steps=10, kwargs={})


@pytest.mark.parametrize(
    ("factory", "kwargs"),
    [
        (lr_scheduler.OneCycleLR, {"max_lr": [1e-4, 8e-4]}),
        (lr_scheduler.CosineAnnealingLR, {}),
        (lr_scheduler.StepLR, {"step_size": 3}),
        (lr_scheduler.ExponentialLR, {"gamma": 0.9}),
        (lr_scheduler.LinearLR, {"total_iters": 5}),
        (lr_scheduler.PolynomialLR, {"total_iters": 10}),
        (optimization.get_inverse_sqrt_schedule, {"num_warmup_steps": 2}),
        (optimization.get_cosine_with_hard_restarts_schedule_with_warmup, {"num_cycles": 2}),
    ],
)
def test_schedules_of_torch_and_transformers_that_keep_it_are_taken(
    factory: Callable[..., Any], kwargs: dict[str, Any]
) -> None:
    schedule = build_schedule(factory, optimizer_at(1e-4, 8e-4), num_training_steps=10, kwargs=kwargs)
    for a, b in rates_of(schedule, 10):
        assert b == pytest.approx(8 * a, rel=1e-6)


def test_a_group_at_rate_zero_stays_there() -> None:
    assert {row[1] for row in rates_of(from_yaml("cosine", optimizer_at(1e-3, 0.0), 10), 10)} == {0.0}
    with pytest.raises(UserError, match="doesn't keep the ratio"):
        build_schedule(
            lr_scheduler.CosineAnnealingLR, optimizer_at(1e-3, 0.0), num_training_steps=10, kwargs={"eta_min": 1e-5}
        )


def test_a_schedule_goes_on_where_a_checkpoint_left_it() -> None:
    whole = rates_of(from_yaml("one_cycle", optimizer_at(1e-4, 8e-4), 20), 20)
    optimizer = optimizer_at(1e-4, 8e-4)
    first = from_yaml("one_cycle", optimizer, 20)
    rates_of(first, 9)
    second_optimizer = optimizer_at(1e-4, 8e-4)
    second = from_yaml("one_cycle", second_optimizer, 20)
    second_optimizer.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert rates_of(second, 10) == whole[10:]


def test_group_of_rate_0_does_not_hide_the_schedule() -> None:
    """A rule may set a rate of 0, such as lora_A's."""
    schedule, arguments = optimization.get_linear_schedule_with_warmup, {"num_warmup_steps": 4}
    for rates in ((0.0, 1e-3), (1e-3, 0.0)):
        optimizer = optimizer_at(*rates, lr=1e-3)
        assert highest_rate_step(schedule, optimizer, num_training_steps=10, kwargs=arguments) == 4
        assert falls(schedule, optimizer, num_training_steps=10, kwargs=arguments)
