"""Learning-rate schedules that keep the LoRA+ ratio at every step."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from loraplus_hydra.errors import UserError, nearest

TOLERANCE = 1e-6
"""Relative difference of two groups' factors that still counts as the same: rates are computed in double precision."""

INSTEAD: dict[str, str] = {
    "OneCycleLR": "Its scalar max_lr is one rate for all groups; use scheduler=one_cycle, or give max_lr as a list",
    "CosineAnnealingLR": "Its eta_min is one floor for all groups; scheduler=cosine_with_min_lr has a share of each",
    "CosineAnnealingWarmRestarts": "Its eta_min is one floor for all groups; leave it at 0",
    "CyclicLR": "Its base_lr and max_lr are the same for all groups; give lists, or use scheduler=one_cycle",
}
"""Schedule class -> what to use in its place."""
_ONE_FACTOR = (
    "Use one that multiplies every rate by the same factor: scheduler=linear, cosine, cosine_with_min_lr, wsd, ..."
)


def build_schedule(
    factory: Callable[..., Any], optimizer: Optimizer, *, num_training_steps: int, kwargs: Mapping[str, Any]
) -> LRScheduler:
    """Build the schedule `factory(optimizer, ...)` after a dry run has shown that it keeps the ratio.

    `factory` is any callable that returns an LRScheduler: a `transformers.get_..._schedule...` function, a class of
    `torch.optim.lr_scheduler`, or your own function. In `kwargs`, `num_warmup_steps` (steps) or `warmup_ratio` (share
    of the training steps, rounded up) set the warm-up, `num_decay_steps` or `decay_ratio` the decay; the others go to
    `factory` unchanged. The number of training steps goes to its `num_training_steps`, `total_steps` or `T_max`, if it
    has one.

    Raises UserError: an argument that `factory` doesn't take or refuses; a schedule that reacts to the loss; a ratio
    that changes, with the step and the rates. `optimizer` is only changed when all is well.
    """
    arguments = _arguments(factory, num_training_steps, kwargs)
    rehearsal = _call(factory, _stand_in(optimizer), arguments)
    _check_ratio(factory, rehearsal, optimizer, num_training_steps)
    return _call(factory, optimizer, arguments)


def named_schedule(name: str) -> Callable[..., Any]:
    """Return the schedule of a name: transformers' `lr_scheduler_type`, or `wsd` or `one_cycle`."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION  # not needed by those who pass a function

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

    The shape of torch's `OneCycleLR`, whose `max_lr` is one for all groups. Rises along a cosine from rate /
    `div_factor` over the first `pct_start` of the steps, then falls along one to rate / `div_factor` /
    `final_div_factor`. Momentum stays unchanged. Source: arXiv 1708.07120.
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


def _arguments(factory: Callable[..., Any], steps: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `factory` with the numbers of steps filled in."""
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
                f"{name} has no {what}, so neither `{what}` nor `{share}` can be set; "
                "use scheduler=linear, cosine or wsd"
            )
        left -= length
    if left < 0 and "num_decay_steps" in parameters:
        raise UserError(
            f"{name}: {given['num_warmup_steps']} steps of warm-up and {given['num_decay_steps']} of decay are more "
            f"than the {steps} there are"
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
        given.setdefault("total_steps", steps + 1)  # the Trainer steps once more than torch counts
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
            f"scheduler.{what}={absolute} and scheduler.{share}={ratio} say the same thing twice: set one of them to 0"
        )
    if ratio > 1:
        raise UserError(
            f"scheduler.{share} is a share of all steps, from 0 to 1, got {ratio}; steps are set by scheduler.{what}"
        )
    if absolute != int(absolute):
        raise UserError(
            f"scheduler.{what} counts steps, got {absolute}; a share of all steps is set by scheduler.{share}"
        )
    # A share never takes the last step: in a run of one step, a rate of 0 would train nothing.
    return int(absolute) if absolute else max(0, min(math.ceil(steps * ratio), left - 1))


def _call(factory: Callable[..., Any], optimizer: Optimizer, arguments: Mapping[str, Any]) -> LRScheduler:
    try:
        schedule = factory(optimizer, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        spelled = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(f"{_name(factory)} refuses its arguments ({spelled}): {error}") from error
    if isinstance(schedule, ReduceLROnPlateau) or (not isinstance(schedule, LRScheduler) and hasattr(schedule, "step")):
        raise UserError(
            f"{_name(factory)} reacts to the loss, with limits that are the same for all groups, so nobody can say "
            "beforehand that it keeps the ratio; use scheduler=linear, cosine, wsd or another that counts steps"
        )
    if not isinstance(schedule, LRScheduler):
        raise UserError(
            f"{_name(factory)} gives {type(schedule).__name__}, which is no torch.optim.lr_scheduler.LRScheduler"
        )
    return schedule


class _StandIn(Optimizer):
    """Groups, rates and defaults of another optimizer without its parameters, for a dry run."""

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
    return _StandIn(groups, dict(optimizer.defaults))


def _check_ratio(factory: Callable[..., Any], schedule: LRScheduler, optimizer: Optimizer, steps: int) -> None:
    if type(schedule) is LambdaLR and len({id(function) for function in schedule.lr_lambdas}) == 1:
        # One factor for all groups, by construction; only that there is one at every step is left to see.
        function = schedule.lr_lambdas[0]
        for step in range(steps + 1):
            _at(factory, step, function, step)
        return
    base = [float(group["lr"]) for group in optimizer.param_groups]
    names = [group.get("name", f"group {index}") for index, group in enumerate(optimizer.param_groups)]
    largest = max(range(len(base)), key=base.__getitem__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the order of steps, in a rehearsal
        for step in range(steps + 1):
            rates = [float(group["lr"]) for group in schedule.optimizer.param_groups]
            for index, rate in enumerate(rates):
                # Both sides are a rate times a rate, so a difference counts relative to them; zero has to meet zero.
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
            f"{_name(factory)} has no rate for step {step}: {error}; change its arguments, or the number of steps"
        ) from error


def _broken(schedule: str, step: int, one: tuple[str, float, float], other: tuple[str, float, float]) -> str:
    """Return the message on two groups, each with its name, its own rate and its rate at the step."""
    return (
        f"{schedule} breaks the ratio between groups: {one[0]} and {other[0]} are set to {one[1]:g} and {other[1]:g}, "
        f"but at step {step} they train at {one[2]:g} and {other[2]:g}. {INSTEAD.get(schedule, _ONE_FACTOR)}"
    )


def _name(factory: Callable[..., Any]) -> str:
    return getattr(factory, "__name__", type(factory).__name__)
