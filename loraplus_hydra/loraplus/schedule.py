"""Learning-rate schedules that keep the LoRA+ ratio at every step."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from loraplus_hydra.errors import UserError, nearest

TOLERANCE = 1e-6
"""The largest relative difference at which two groups' factors are equal. Rates have double precision."""

INSTEAD: dict[str, str] = {
    "OneCycleLR": "A single max_lr is one rate for all groups; use scheduler=one_cycle, or set max_lr to a list",
    "CosineAnnealingLR": "eta_min is one smallest rate for all groups; use scheduler=cosine_with_min_lr",
    "CosineAnnealingWarmRestarts": "eta_min is the same smallest rate for all groups; leave it at 0",
    "CyclicLR": "base_lr and max_lr are the same for all groups; set them to lists, or use scheduler=one_cycle",
}
"""Schedule class -> advice on what to use instead."""
_LENGTHS = ("num_training_steps", "total_steps", "T_max", "num_warmup_steps", "num_decay_steps")
_ONE_FACTOR = (
    "Use one that multiplies every rate by the same factor: scheduler=linear, cosine, cosine_with_min_lr, wsd, ..."
)


def build_schedule(
    factory: Callable[..., Any], optimizer: Optimizer, *, num_training_steps: int, kwargs: Mapping[str, Any]
) -> LRScheduler:
    """Build the schedule `factory(optimizer, ...)`. First a dry run checks that it keeps the ratio.

    `factory` is any callable that returns an LRScheduler: a `transformers.get_..._schedule...` function, a class of
    `torch.optim.lr_scheduler`, or your own function. In `kwargs`, `num_warmup_steps` (steps) or `warmup_ratio` (share
    of the training steps, rounded up) set the warm-up; `num_decay_steps` or `decay_ratio` set the decay. Other
    arguments are passed to `factory` unchanged. If `factory` has a parameter `num_training_steps`, `total_steps` or
    `T_max`, it gets the number of training steps.

    Raises UserError if `factory` doesn't have or refuses an argument, if the schedule reacts to the loss, or if the
    ratio changes (the message has the step and the rates). After an error, `optimizer` is unchanged.
    """
    arguments = fill_arguments(factory, num_training_steps, kwargs)
    rehearsal = _call(factory, _stand_in(optimizer), arguments)
    _check_ratio(factory, rehearsal, optimizer, num_training_steps)
    return _call(factory, optimizer, arguments)


def highest_rate_step(
    factory: Callable[..., Any], optimizer: Optimizer, *, num_training_steps: int, kwargs: Mapping[str, Any]
) -> int:
    """Return the first step with the schedule's highest rate, which is the end of a warm-up.

    The arguments are those of `build_schedule`. `optimizer` is unchanged.
    """
    rates = _rates(factory, optimizer, num_training_steps, kwargs)
    return rates.index(max(rates))


def falls(
    factory: Callable[..., Any], optimizer: Optimizer, *, num_training_steps: int, kwargs: Mapping[str, Any]
) -> bool:
    """Return True if the schedule's rate is lower at a step than at the step before.

    The arguments are those of `build_schedule`. `optimizer` is unchanged.
    """
    rates = _rates(factory, optimizer, num_training_steps, kwargs)
    return any(later < earlier for earlier, later in pairwise(rates))


def _rates(factory: Callable[..., Any], optimizer: Optimizer, steps: int, kwargs: Mapping[str, Any]) -> list[float]:
    """Return the rate at each step of the group with the largest rate, because a rule's rate may be 0."""
    stand_in = _stand_in(optimizer)
    for group, own in zip(stand_in.param_groups, optimizer.param_groups, strict=True):
        group["lr"] = own.get("initial_lr", own["lr"])
    largest = max(stand_in.param_groups, key=lambda group: float(group["lr"]))
    schedule = _call(factory, stand_in, fill_arguments(factory, steps, kwargs))
    rates = []
    for _ in range(steps):
        rates.append(float(largest["lr"]))
        stand_in.step()
        schedule.step()
    return rates


def named_schedule(name: str) -> Callable[..., Any]:
    """Return the schedule with this name: a `lr_scheduler_type` of transformers, `wsd` or `one_cycle`."""
    # takes seconds, and only names need it
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    known: dict[str, Callable[..., Any]] = {kind.value: each for kind, each in TYPE_TO_SCHEDULER_FUNCTION.items()}
    known |= {"wsd": known["warmup_stable_decay"], "one_cycle": one_cycle}
    if name not in known:
        raise UserError(f"there is no schedule '{name}'{nearest(name, known)}; the schedules are {', '.join(known)}")
    return known[name]


def one_cycle(
    optimizer: Optimizer,
    num_training_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    last_epoch: int = -1,
) -> LRScheduler:
    """Return one cycle with each group's own rate as its peak.

    The shape is that of torch's `OneCycleLR`, which has the same `max_lr` for all groups. Over the first `pct_start` of
    the steps (a share), the rate rises from rate / `div_factor` along a cosine. Then it falls along a cosine to rate /
    `div_factor` / `final_div_factor`. Momentum stays unchanged. Source: arXiv 1708.07120.
    """
    if not 0 <= pct_start <= 1:
        raise ValueError(f"pct_start is a share of the steps, from 0 to 1, got {pct_start}")
    if div_factor <= 0 or final_div_factor <= 0:
        raise ValueError(f"div_factor and final_div_factor must be above 0, got {div_factor} and {final_div_factor}")
    first, last = 1 / div_factor, 1 / div_factor / final_div_factor
    peak = pct_start * num_training_steps - 1
    end = num_training_steps - 1

    def factor(step: int) -> float:
        if step <= peak:
            return _cosine(first, 1.0, step / peak if peak > 0 else 1.0)
        return _cosine(1.0, last, min(1.0, (step - peak) / (end - peak)) if end > peak else 1.0)

    return LambdaLR(optimizer, factor, last_epoch)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def fill_arguments(factory: Callable[..., Any], steps: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `factory` with the numbers of steps filled in.

    Raises UserError if `factory` doesn't have an argument, or if the phases are longer than the run's `steps`.
    """
    name = _name(factory)
    given = {key: value for key, value in kwargs.items() if value is not None}
    parameters = inspect.signature(factory).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    left = steps
    for what, share in (("num_warmup_steps", "warmup_ratio"), ("num_decay_steps", "decay_ratio")):
        length = _length(given, what, share, steps, left)
        if what in parameters:
            given[what] = length
        elif length:
            raise UserError(
                f"{name} has no argument {what}, so neither `{what}` nor `{share}` can be set; "
                "use scheduler=linear, cosine or wsd"
            )
        left -= length
    if left < 0 and "num_decay_steps" in parameters:
        raise UserError(
            f"{name}: {given['num_warmup_steps']} steps of warm-up and {given['num_decay_steps']} of decay are more "
            f"than the run's {steps} steps"
        )
    unknown = [key for key in given if key not in parameters and not takes_any]
    if unknown:
        names = [key for key in parameters if key not in ("optimizer", "last_epoch")]
        raise UserError(
            f"{name} takes no argument '{unknown[0]}'{nearest(unknown[0], names)}; it takes {', '.join(names)}"
        )
    if "num_training_steps" in parameters:
        given.setdefault("num_training_steps", steps)
    if "total_steps" in parameters and "epochs" not in given:
        given.setdefault("total_steps", steps + 1)  # the Trainer steps the schedule once more than torch allows
    if "T_max" in parameters:
        given.setdefault("T_max", steps)
    return given


def _length(given: dict[str, Any], what: str, share: str, steps: int, left: int) -> int:
    absolute, ratio = given.pop(what, 0), given.pop(share, 0)
    for key, value in ((what, absolute), (share, ratio)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(f"scheduler.{key} must be a number, 0 or more, got {value!r}")
    if absolute and ratio:
        raise UserError(
            f"scheduler.{what}={absolute} and scheduler.{share}={ratio} set the same thing twice: set one of them to 0"
        )
    if ratio > 1:
        raise UserError(
            f"scheduler.{share} is a share of all steps, from 0 to 1, got {ratio}; to give a number of steps, use "
            f"scheduler.{what}"
        )
    if absolute != int(absolute):
        raise UserError(
            f"scheduler.{what} is a number of steps, got {absolute}; to give a share of all steps, use "
            f"scheduler.{share}"
        )
    # A share never includes the last step. Otherwise a run of one step would train at a rate of 0.
    return int(absolute) if absolute else max(0, min(math.ceil(steps * ratio), left - 1))


def _call(factory: Callable[..., Any], optimizer: Optimizer, arguments: Mapping[str, Any]) -> LRScheduler:
    try:
        schedule = factory(optimizer, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        # Without the lengths, which are stand-ins in a check of a config
        spelled = ", ".join(f"{key}={value}" for key, value in arguments.items() if key not in _LENGTHS)
        raise UserError(f"{_name(factory)} refuses the arguments {spelled}: {error}") from error
    if isinstance(schedule, ReduceLROnPlateau) or (not isinstance(schedule, LRScheduler) and hasattr(schedule, "step")):
        raise UserError(
            f"{_name(factory)} reacts to the loss, with the same limits for all groups, so it is not known in advance "
            "that it keeps the ratio; use scheduler=linear, cosine, wsd or another schedule that depends only on the "
            "step"
        )
    if not isinstance(schedule, LRScheduler):
        raise UserError(
            f"{_name(factory)} returns {type(schedule).__name__}, which is not a torch.optim.lr_scheduler.LRScheduler"
        )
    return schedule


class _StandIn(Optimizer):
    """An optimizer for a dry run, with another optimizer's groups, rates and defaults.

    It has no parameters.
    """

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def _stand_in(optimizer: Optimizer) -> Optimizer:
    left_out = ("params", "param_names", "initial_lr")
    groups = [
        {
            **copy.deepcopy({key: value for key, value in group.items() if key not in left_out}),
            "params": [nn.Parameter()],
        }
        for group in optimizer.param_groups
    ]
    # DeepSpeed's optimizers have no `defaults`; those of torch's OneCycleLR need none without momentum
    return _StandIn(groups, dict(getattr(optimizer, "defaults", {})))


def _check_ratio(factory: Callable[..., Any], schedule: LRScheduler, optimizer: Optimizer, steps: int) -> None:
    if type(schedule) is LambdaLR and len({id(function) for function in schedule.lr_lambdas}) == 1:
        # A LambdaLR has one factor for all groups by construction, so only the existence of a factor at every step is
        # checked.
        function = schedule.lr_lambdas[0]
        for step in range(steps + 1):
            _at(factory, step, function, step)
        return
    base = [float(group["lr"]) for group in optimizer.param_groups]
    names = [group.get("name", f"group {index}") for index, group in enumerate(optimizer.param_groups)]
    largest = max(range(len(base)), key=base.__getitem__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the order of steps, which is irrelevant in a dry run
        for step in range(steps + 1):
            rates = [float(group["lr"]) for group in schedule.optimizer.param_groups]
            for index, rate in enumerate(rates):
                # Both sides are products of two rates, so their difference is compared relative to them. If one is
                # zero, both must be zero.
                if not math.isclose(rate * base[largest], rates[largest] * base[index], rel_tol=TOLERANCE, abs_tol=0.0):
                    pair = ((names[each], base[each], rates[each]) for each in (index, largest))
                    raise UserError(_broken(_name(factory), step, *pair))
            if step < steps:
                schedule.optimizer.step()
                _at(factory, step + 1, schedule.step)


def _at(factory: Callable[..., Any], step: int, call: Callable[..., Any], *arguments: Any) -> None:
    try:
        call(*arguments)
    except (ArithmeticError, ValueError) as error:
        raise UserError(
            f"{_name(factory)} fails at step {step}: {error}; change its arguments, or the number of steps"
        ) from error


def _broken(schedule: str, step: int, one: tuple[str, float, float], other: tuple[str, float, float]) -> str:
    """Return the message about two groups, each given by name, set rate and rate at the step."""
    return (
        f"{schedule} doesn't keep the ratio between groups: the rates of {one[0]} and {other[0]} are set to {one[1]:g} "
        f"and {other[1]:g}, but at step {step} they are {one[2]:g} and {other[2]:g}. "
        f"{INSTEAD.get(schedule, _ONE_FACTOR)}"
    )


def _name(factory: Callable[..., Any]) -> str:
    return getattr(factory, "__name__", type(factory).__name__)
