"""Optimizers built from parameter groups.

One of the functions is a drop-in for PEFT's `create_loraplus_optimizer`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.factor_pairs import Pair, PairedOptimizer, factor_pairs, freeze_untrained
from loraplus_hydra.loraplus.grouping import assign, check_rate, first_match, groups_of, plan_of
from loraplus_hydra.loraplus.optimizer_check import (
    has_weight_decay,
    optimizer_problems,
    shared_settings,
    takes,
    unknown_setting,
)
from loraplus_hydra.loraplus.peft_layers import LORA_B_ROLES
from loraplus_hydra.loraplus.plan import Group
from loraplus_hydra.loraplus.roles import trained_tensors
from loraplus_hydra.loraplus.rules import Rule, Rules, as_rules


def create_loraplus_optimizer(
    model: torch.nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float | None = None,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Return a LoRA+ optimizer: lora_A trains at `lr`, lora_B at `lr` x `loraplus_lr_ratio`.

    A drop-in for `peft.optimizers.create_loraplus_optimizer` (LoRA+, arXiv 2402.12354). It has the same four groups in
    the same order (A, embedding, B, B without decay), also if a group is empty. Four things differ. Norm weights of
    every kind don't decay; PEFT excludes only `nn.LayerNorm`. bitsandbytes' 8-bit optimizers keep 32-bit state for
    trained embedding tensors, and other optimizers are not affected. A lora_B is found by the layer that owns it, not
    by its name. `weight_decay=` is used as `loraplus_weight_decay`; PEFT silently ignores it.

    `lr` is eta_A, and `loraplus_lr_ratio` is eta_B / eta_A. `loraplus_lr_embedding` is the rate of a LoRA embedding's
    factors, and `loraplus_weight_decay` (0.0) is the decay of the first three groups. All other arguments are passed to
    `optimizer_cls`. Raises UserError (a ValueError) for a rate or ratio that isn't finite and above 0. Warns if the
    model has no adapter.
    """
    check_rate(lr, "lr")
    check_rate(loraplus_lr_ratio, "loraplus_lr_ratio")
    check_rate(loraplus_lr_embedding, "loraplus_lr_embedding")
    decay = _one_weight_decay(loraplus_weight_decay, kwargs.pop("weight_decay", None))
    rules = _drop_in_rules(ratio=loraplus_lr_ratio, lr_embedding=loraplus_lr_embedding)
    freeze_untrained(optimizer_cls, model)
    records, parameters = trained_tensors(model)
    if all(record.adapter is None for record in records):
        warnings.warn(
            "the model has no adapter, so there is no lora_B to train at the LoRA+ ratio; add an adapter first "
            "(get_peft_model)",
            stacklevel=2,
        )
    plan = plan_of(records, first_match(records, rules), groups_of(rules, lr=lr, weight_decay=decay))
    pairs = factor_pairs(model) if issubclass(optimizer_cls, PairedOptimizer) else None
    return build_optimizer(optimizer_cls, plan.groups, parameters.items(), {"lr": lr, **kwargs}, pairs=pairs)


def group_parameters(
    model: torch.nn.Module,
    rules: Rules,
    *,
    lr: float,
    weight_decay: float = 0.0,
    extra_rules: Rules = (),
) -> list[dict[str, Any]]:
    """Return parameter groups that you can pass to any torch optimizer.

    Each group has `params`, `param_names`, `name`, `lr`, `weight_decay` and the rule's settings. `rules` is a list of
    `Rule`s, for example from `preset_rules`, or a mapping as in the YAML files. `extra_rules` come before `rules`. The
    groups don't set the bits of 8-bit state; `build_optimizer` does. Raises UserError for the same reasons as
    `grouping.assign`.
    """
    records, parameters = trained_tensors(model)
    extra = as_rules(extra_rules, "loraplus.extra_rules")
    plan = assign(records, as_rules(rules), lr=lr, weight_decay=weight_decay, extra=extra)
    return torch_groups(plan.groups, parameters.items())


def build_optimizer(
    optimizer_cls: type[Optimizer],
    groups: Sequence[Group],
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    kwargs: Mapping[str, Any],
    *,
    pairs: Sequence[Pair] | None = None,
) -> Optimizer:
    """Build an `optimizer_cls` with a torch parameter group for each of `groups`.

    Each torch group also has its name and its parameters' names. `named_parameters` may come from a wrapped model if
    the names are those of the records. `kwargs` are the class's arguments. `pairs` are the model's `factor_pairs`, for
    a PairedOptimizer. With bitsandbytes' 8-bit classes, trained embedding tensors keep 32-bit state. Raises UserError
    for a class that can't have a rate for each group, or that doesn't have one of the settings for each group.
    """
    problems = optimizer_problems(optimizer_cls, kwargs)
    problems += [problem for group in groups if (problem := unknown_setting(optimizer_cls, group))]
    if problems:
        raise UserError("; ".join(problems))
    param_groups = torch_groups(groups, named_parameters)
    if not takes(optimizer_cls, "weight_decay"):
        for param_group in param_groups:
            del param_group["weight_decay"]
    arguments = dict(kwargs)
    if groups and takes(optimizer_cls, "lr"):
        arguments.setdefault("lr", groups[0].lr)
    if has_weight_decay(optimizer_cls) and not any(group.weight_decay for group in groups):
        arguments.setdefault("weight_decay", 0.0)  # a class with one decay for all would use its default
    try:
        optimizer = optimizer_cls(param_groups, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{optimizer_cls.__name__} refuses these parameters or arguments: {error}"
            + _muon_advice(optimizer_cls, groups)
        ) from error
    if problems := shared_settings(optimizer, groups):
        raise UserError("; ".join(problems))
    if isinstance(optimizer, PairedOptimizer):
        optimizer.pairs = pairs
    _keep_32bit_state(optimizer, groups)
    return optimizer


def torch_groups(
    groups: Iterable[Group], named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> list[dict[str, Any]]:
    """Return torch parameter groups for `groups`. Parameters are found by name.

    Raises UserError if no parameter has a record's name.
    """
    by_name = dict(named_parameters)
    try:
        return [
            {
                "name": group.name,
                "params": [by_name[record.name] for record in group.records],
                "param_names": [record.name for record in group.records],
                "lr": group.lr,
                "weight_decay": group.weight_decay,
                **group.settings,
            }
            for group in groups
        ]
    except KeyError as error:
        raise UserError(
            f"the model has no parameter {error.args[0]}: its names changed after the groups were made"
        ) from error


def _drop_in_rules(*, ratio: float, lr_embedding: float) -> list[Rule]:
    """Return the groups that PEFT documents as rules.

    One-dimensional tensors train at the rate of lora_B. Norms and biases don't decay.
    """
    undecayed = ("bias", "norm", "lora_B_bias")
    return [
        Rule("embedding", role=("lora_embedding_A", "lora_embedding_B"), lr=lr_embedding),
        Rule("groupB_no_decay", role=undecayed, ndim=(1,), ratio=ratio, weight_decay=0.0),
        Rule("groupB", role=LORA_B_ROLES, ratio=ratio),
        Rule("vectors", ndim=(1,), group="groupB", ratio=ratio),
        Rule("groupA"),
    ]


def _one_weight_decay(loraplus_weight_decay: float | None, weight_decay: float | None) -> float:
    if weight_decay is None:
        decay = 0.0 if loraplus_weight_decay is None else loraplus_weight_decay
    elif loraplus_weight_decay is None or loraplus_weight_decay == weight_decay:
        warnings.warn("weight_decay is used as loraplus_weight_decay; PEFT's function ignores it", stacklevel=3)
        decay = weight_decay
    else:
        raise UserError(
            f"loraplus_weight_decay={loraplus_weight_decay} and weight_decay={weight_decay} contradict each other: "
            "give loraplus_weight_decay only"
        )
    return check_rate(decay, "loraplus_weight_decay", zero=True)


def _muon_advice(optimizer_cls: type[Optimizer], groups: Sequence[Group]) -> str:
    if optimizer_cls.__name__ != "Muon":
        return ""
    others = [f"{record.name} ({record.ndim}-D)" for group in groups for record in group.records if record.ndim != 2]
    return (
        f". Muon can only train matrices, but these tensors are also trained: {', '.join(others[:3])}. Use "
        "optimizer=adamw, or train only matrices"
    )


def _keep_32bit_state(optimizer: Any, groups: Sequence[Group]) -> None:
    """Make a bitsandbytes optimizer keep 32-bit state for trained embeddings; leave others unchanged.

    Call this before the first step. After this call the optimizer ignores overrides in bitsandbytes' global manager.
    """
    if "bitsandbytes" not in sys.modules:  # without bitsandbytes imported, no class can derive from its base class
        return
    from bitsandbytes.optim.optimizer import GlobalOptimManager, Optimizer8bit

    if not isinstance(optimizer, Optimizer8bit):
        return
    # The optimizer gets its own manager. The global manager finds tensors by (group index, position), so it would apply
    # one job's overrides to the first tensors of the next job. It also keeps registered modules alive.
    manager: Any = GlobalOptimManager.__new__(GlobalOptimManager)  # a singleton's __init__ raises
    manager.initialize()
    names = {record.name for group in groups for record in group.records if record.trained_embedding}
    # Tensors are found by their position in the groups. Their id changes when a trainer moves, shards or replaces them.
    manager.index2config = {
        (group_index, position): {"optim_bits": 32}
        for group_index, group in enumerate(optimizer.param_groups)
        for position, name in enumerate(group["param_names"])
        if name in names
    }
    optimizer.mng = manager
