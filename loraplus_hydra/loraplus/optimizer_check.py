"""Checks that an optimizer class with its arguments can train with LoRA+."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from loraplus_hydra.errors import nearest
from loraplus_hydra.loraplus.plan import Group
from loraplus_hydra.loraplus.rules import RULE_KEYS

_SAME = 1e-3  # relative difference within which two steps are equally large; rounding makes a smaller one
OWN_RATE = "chooses its rate itself, so it ignores the groups' rates and the ratio"

# Module -> why its own optimizer classes can't be used. A class of this program derives from each of them.
REFUSED_MODULES: dict[str, str] = {
    "peft.optimizers.lorafa": (
        "finds lora_A and lora_B by their places in one group, so it can't keep groups; use optimizer=lora_fa"
    ),
    "schedulefree": (
        "changes the trained weights by rounding at each evaluation and checkpoint, so a resumed run would differ; use "
        "optimizer=schedulefree_adamw"
    ),
}

REFUSED: dict[str, str] = {
    "LBFGS": "accepts only one parameter group, so A and B can't have different rates",
    "Rprop": "has a step size for each weight; lr is only their start value, and the schedule doesn't change them",
    "SparseAdam": "accepts only sparse gradients; an adapter's gradients are dense",
    **dict.fromkeys(("Prodigy", "DAdaptAdam", "DAdaptAdamW", "DAdaptAdaGrad", "DAdaptSGD"), OWN_RATE),
    **dict.fromkeys(("DAdaptLion", "DAdaptAdan", "DAdaptAdanIP"), OWN_RATE),
    **dict.fromkeys(("Lomo", "AdaLomo"), "updates during the backward pass, with one rate for all"),
}
"""Class name -> why the class can't train each group at its own rate."""

TORCH_ADAFACTOR = (
    "torch's Adafactor scales each update by the parameter's own size, so lora_B, which starts at zero, hardly moves "
    "(measured: B's update 0.08 of A's at ratio 8); use optimizer=adafactor, which is transformers' class with "
    "scale_parameter=false"
)
TRANSFORMERS_ADAFACTOR: dict[str, str] = {
    "relative_step": "computes the rate from the step count, so no group's rate is used; set `relative_step: false`",
    "scale_parameter": (
        "scales each update by the parameter's own size, so lora_B, which starts at zero, hardly moves; set "
        "`scale_parameter: false`"
    ),
}


def optimizer_problems(cls: object, kwargs: Mapping[str, Any]) -> list[str]:
    """Return the reasons, one sentence each, why this class with these arguments can't be used.

    `kwargs` are the arguments without the parameters. No optimizer is built. Possible reasons: the class isn't a
    subclass of Optimizer; it ignores the groups' own rates; it doesn't have an argument (the nearest valid name is
    shown); an argument is missing.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        return [f"{_spell(cls)} is not a subclass of torch.optim.Optimizer"]
    problems = [refusal] if (refusal := class_refusal(cls)) else []
    if "Adafactor" in [base.__name__ for base in cls.__mro__]:
        problems += _adafactor_problems(cls, kwargs)
    return problems + _argument_problems(cls, kwargs)


def class_refusal(cls: type) -> str:
    """Return why this optimizer class can't be used with any arguments; empty if it can be used."""
    refused = [REFUSED[base.__name__] for base in cls.__mro__ if base.__name__ in REFUSED]
    refused += [why for module, why in REFUSED_MODULES.items() if f"{cls.__module__}.".startswith(f"{module}.")]
    return f"{cls.__name__} can't be used: it {refused[0]}" if refused else ""


def ignored_rates(cls: type[Optimizer], kwargs: Mapping[str, Any]) -> str:
    """Return why the class doesn't train each group at the group's own rate; empty if it does.

    Two equal tensors with equal gradients are trained in groups with different rates, which are then exchanged. If the
    optimizer can't be tried, nothing is known, and the result is empty.
    """
    low, high = 1e-3, 4e-3
    start = torch.linspace(-1, 1, 64).reshape(8, 8)  # a matrix, because Muon trains nothing else
    tensors = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    groups = [{"params": [tensor], "lr": lr} for tensor, lr in zip(tensors, (low, high), strict=True)]
    try:
        optimizer = cls(groups, **{"lr": low, **kwargs} if takes(cls, "lr") else kwargs)
        if len(optimizer.param_groups) != len(groups):
            return f"{cls.__name__} doesn't keep the parameter groups that it is given, so A and B get one rate"
        first = _moves(optimizer, tensors)
        for group, lr in zip(optimizer.param_groups, (high, low), strict=True):
            group["lr"] = lr
        _moves(optimizer, tensors)  # some classes, such as ASGD, take a new rate one step later
        second = _moves(optimizer, tensors)
    except Exception:  # a class may need more than two tensors, or a GPU
        return ""
    if not all(0 < move < math.inf for move in (*first, *second)):
        return ""
    if math.isclose(*first, rel_tol=_SAME):
        return f"{cls.__name__} takes equal steps in groups with different rates, so the ratio would do nothing"
    if math.isclose(first[1] / first[0], second[1] / second[0], rel_tol=_SAME):
        return f"{cls.__name__} doesn't follow changes of its groups' rates, so the schedule would do nothing"
    return ""


def _moves(optimizer: Optimizer, tensors: Sequence[torch.Tensor]) -> list[float]:
    """Return how far each tensor moves in one step, all with the same gradient."""
    before = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = torch.linspace(1, 2, tensor.numel()).reshape(tensor.shape)
    optimizer.step()
    return [float((tensor.detach() - old).norm()) for tensor, old in zip(tensors, before, strict=True)]


def takes(cls: type, argument: str) -> bool:
    """Return True if the class's constructor has this argument, or accepts any."""
    parameters, takes_any = _parameters(cls)
    return takes_any or argument in parameters


def unknown_setting(cls: type, group: Group) -> str:
    """Return the error in a group's settings for this class; empty if the settings are valid."""
    for key in group.settings:
        if not takes(cls, key):
            candidates = [*RULE_KEYS, *_parameters(cls)[0]]
            rule = ", ".join(group.rules) or group.name
            return f"rule {rule}: {cls.__name__} has no setting '{key}'{nearest(key, candidates)}"
    if group.weight_decay and not takes(cls, "weight_decay"):
        return f"group {group.name}: {cls.__name__} has no weight decay, but {group.weight_decay:g} is set"
    return ""


def shared_settings(optimizer: Optimizer, groups: Sequence[Group]) -> list[str]:
    """Return an error for each setting of a group that the optimizer doesn't read from its groups."""
    name, problems = type(optimizer).__name__, []
    for group in groups:
        rule = ", ".join(group.rules) or group.name
        problems += [
            f"rule {rule}: {name} has one `{key}` for all groups; set it as the class's argument"
            for key in group.settings
            if key not in optimizer.defaults
        ]
    decays = max((group.weight_decay for group in groups), default=0.0)
    if decays and "weight_decay" not in optimizer.defaults:
        problems.append(f"{name} has one `weight_decay` for all groups, so {decays:g} has no effect; set it to 0")
    return problems


def has_weight_decay(cls: type) -> bool:
    """Return True if the class's constructor names `weight_decay`."""
    return "weight_decay" in _parameters(cls)[0]


def _adafactor_problems(cls: type, kwargs: Mapping[str, Any]) -> list[str]:
    if not takes(cls, "relative_step"):
        return [TORCH_ADAFACTOR]
    parameters, _ = _parameters(cls)
    return [
        f"{cls.__name__} with {argument} {reason}"
        for argument, reason in TRANSFORMERS_ADAFACTOR.items()
        if kwargs.get(argument, parameters[argument].default)
    ]


def _argument_problems(cls: type, kwargs: Mapping[str, Any]) -> list[str]:
    parameters, takes_any = _parameters(cls)
    problems = []
    if not takes_any:
        problems += [
            f"{cls.__name__} takes no argument '{key}'{nearest(key, parameters)}; it takes {', '.join(parameters)}"
            for key in kwargs
            if key not in parameters
        ]
    problems += [
        f"{cls.__name__} needs an argument '{key}'"
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in kwargs and key != "lr"
    ]
    return problems


def _parameters(cls: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the constructor's arguments after `params`, and True if it also has **kwargs."""
    found = list(inspect.signature(cls).parameters.values())
    named = [each for each in found if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    return {each.name: each for each in named[1:]}, any(each.kind == each.VAR_KEYWORD for each in found)


def _spell(cls: object) -> str:
    return f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else repr(cls)
