"""Build optimizers from parameter groups, among them the drop-in for PEFT's LoRA+ function."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.grouping import assign, check_rate, first_match, groups_of, plan_of
from loraplus_hydra.loraplus.optimizer_check import optimizer_problems, takes, unknown_setting
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

    A drop-in for `peft.optimizers.create_loraplus_optimizer` (LoRA+, arXiv 2402.12354): the same four groups in the
    same order (A, embedding, B, B without decay), empty ones too. Four things differ. Norm weights of every kind don't
    decay; PEFT knows `nn.LayerNorm` only. bitsandbytes' 8-bit optimizers really keep 32-bit state for trained embedding
    tensors, and only for this optimizer. lora_B is known by the layer that owns it, not by its name. `weight_decay=`,
    which PEFT silently ignores, counts as `loraplus_weight_decay`.

    `lr` is eta_A, `loraplus_lr_ratio` eta_B / eta_A, `loraplus_lr_embedding` the rate of the factors of a LoRA
    embedding, `loraplus_weight_decay` (0.0) the decay of the first three groups. All other arguments go to
    `optimizer_cls`. Raises UserError (a ValueError) for a rate or ratio that isn't finite and above 0. Warns of a model
    without an adapter.
    """
    check_rate(lr, "lr")
    check_rate(loraplus_lr_ratio, "loraplus_lr_ratio")
    check_rate(loraplus_lr_embedding, "loraplus_lr_embedding")
    decay = _one_weight_decay(loraplus_weight_decay, kwargs.pop("weight_decay", None))
    rules = _drop_in_rules(ratio=loraplus_lr_ratio, lr_embedding=loraplus_lr_embedding)
    records, parameters = trained_tensors(model)
    if all(record.adapter is None for record in records):
        warnings.warn(
            "the model has no adapter, so no tensor gets the LoRA+ ratio as a lora_B; add one first (get_peft_model)",
            stacklevel=2,
        )
    plan = plan_of(records, first_match(records, rules), groups_of(rules, lr=lr, weight_decay=decay))
    return build_optimizer(optimizer_cls, plan.groups, parameters.items(), {"lr": lr, **kwargs})


def group_parameters(
    model: torch.nn.Module,
    rules: Rules,
    *,
    lr: float,
    weight_decay: float = 0.0,
    extra_rules: Rules = (),
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer of your own.

    Each has `params`, `param_names`, `name`, `lr`, `weight_decay` and the rule's settings. `rules` are `Rule`s, such as
    those of `preset_rules`, or a mapping as in the YAML files; `extra_rules` stand ahead of them. Raises UserError as
    `grouping.assign` does. The groups say nothing about 8-bit state: `build_optimizer` sets that.
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
) -> Optimizer:
    """`optimizer_cls` over `groups`, each with its name and its parameters' names in it.

    `named_parameters` may come from the wrapped model, as long as the names are the records'. `kwargs` are the
    class's arguments; a `lr` and a `weight_decay` among them are its defaults, while each group has its own. Under
    bitsandbytes' 8-bit classes trained embedding tensors keep 32-bit state. Raises UserError for a class that can't,
    or for a setting that it doesn't have.
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
    try:
        optimizer = optimizer_cls(param_groups, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{optimizer_cls.__name__} refuses these parameters or arguments: {error}"
            + _muon_advice(optimizer_cls, groups)
        ) from error
    if _is_bitsandbytes(optimizer):
        _keep_32bit_state(optimizer, groups)
    return optimizer


def torch_groups(
    groups: Iterable[Group], named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> list[dict[str, Any]]:
    """Return groups of records as torch parameter groups, matched by name.

    Raises UserError for a name that no parameter has.
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
    """Return PEFT's documented table as rules.

    One-dimensional tensors train like lora_B; norms and biases among them don't decay.
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
        f". Muon takes matrices only, and here it would also get {', '.join(others[:3])}: "
        "use optimizer=adamw, or train matrices only"
    )


def _is_bitsandbytes(optimizer: Optimizer) -> bool:
    """Return True if the optimizer's class derives from bitsandbytes' base class, which reads a manager."""
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.optim.optimizer import Optimizer8bit

    return isinstance(optimizer, Optimizer8bit)


def _keep_32bit_state(optimizer: Any, groups: Sequence[Group]) -> None:
    """Make a bitsandbytes optimizer keep 32-bit state for trained embeddings. Call it before the first step.

    Overrides in bitsandbytes' global manager no longer reach the optimizer.
    """
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    # A manager of its own. The global one goes by (group index, position), so that one job's overrides reach the first
    # tensors of the next job, and it keeps modules registered with it alive.
    manager: Any = GlobalOptimManager.__new__(GlobalOptimManager)  # its __init__ refuses: there is to be one only
    manager.initialize()
    names = {record.name for group in groups for record in group.records if record.trained_embedding}
    # By position: a tensor's id changes when a trainer moves, shards or replaces it, its place in the groups doesn't.
    manager.index2config = {
        (group_index, position): {"optim_bits": 32}
        for group_index, group in enumerate(optimizer.param_groups)
        for position, name in enumerate(group["param_names"])
        if name in names
    }
    optimizer.mng = manager
