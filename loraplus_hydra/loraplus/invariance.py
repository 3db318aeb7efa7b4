"""The run of plain LoRA that equals a LoRA+ run.

LoRA adds scale x B A to a weight, where scale is proportional to alpha. If an optimizer's steps don't depend on the
gradient's scale, losses stay the same when, for any p and q,

    alpha -> alpha / (p q)
    A's start -> p x A's start, eta_A -> p x eta_A
    B's start -> q x B's start, eta_B -> q x eta_B

(The lemma on parametrization invariances of "LoRA Without Regret", Thinking Machines, 2025.) A start at zero stays at
zero. So p and q can make both rates equal:

    B = 0 (Init[1]): p = 1, q = 1 / ratio, which is plain LoRA with alpha x ratio at eta_A.
    A = 0 (Init[2]): p = ratio, q = 1, which is plain LoRA with alpha / ratio at eta_B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplus_hydra.loraplus.advice import initialisation
from loraplus_hydra.loraplus.plan import Plan, PlannedTensor
from loraplus_hydra.loraplus.scale_free import has_eps, is_scale_free

if TYPE_CHECKING:
    from peft import LoraConfig  # importing it loads transformers

_WITHOUT_DECAY = ("bias", "norm", "magnitude", "lora_B_bias")  # roles of the preset `none`; vectors don't decay, either


@dataclass(frozen=True)
class Rates:
    """The rates of a LoRA+ run beside its start and its alpha."""

    alpha: float  # as if the scale were alpha / rank: rsLoRA's is larger by the rank's square root
    eta_a: float
    eta_b: float
    init: str | None  # Init[1]: B starts at zero; Init[2]: A starts at zero; None: neither
    width: int | None  # input width of the adapted layers, as a median; None if A's start is not PEFT's usual one

    @property
    def ratio(self) -> float:
        return self.eta_b / self.eta_a

    @property
    def alpha_eta_b(self) -> float:
        """alpha x eta_B: how fast the added weight grows if B starts at zero."""
        return self.alpha * self.eta_b

    @property
    def steps_of_a(self) -> float | None:
        """init_A / eta_A: the number of Adam's steps in which A moves as far as its start is from zero.

        PEFT usually starts A with a uniform distribution of standard deviation 1 / sqrt(3 x input width). None for
        another start.
        """
        return 1 / math.sqrt(3 * self.width) / self.eta_a if self.width and self.eta_a else None


@dataclass(frozen=True)
class Plain:
    """A run of plain LoRA, and everything that keeps it from being exactly equal."""

    alpha: float
    lr: float
    differences: tuple[str, ...]

    def overrides(self) -> str:
        """Return the overrides of this run."""
        return f"loraplus=none adapter.lora_alpha={self.alpha:g} optimizer.lr={self.lr:g}"


def rates_of(plan: Plan, adapter: LoraConfig) -> Rates | None:
    """Return the rates; None if lora_A or lora_B have no tensors, or several rates."""
    a, b = ({tensor.group.lr for tensor in plan.tensors if tensor.record.role == role} for role in ("lora_A", "lora_B"))
    if len(a) != 1 or len(b) != 1:
        return None
    widths = sorted(record.shape[-1] for record in plan.records if record.role == "lora_A")
    init = initialisation(plan.records)
    usual = init == "Init[1]" and adapter.init_lora_weights is True
    alpha = effective_alpha(adapter.lora_alpha, adapter.r, rslora=adapter.use_rslora)
    return Rates(alpha, a.pop(), b.pop(), init, widths[len(widths) // 2] if usual else None)


def effective_alpha(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return the alpha of a usual LoRA, whose scale is alpha / rank, with this adapter's scale.

    rsLoRA's scale is alpha / sqrt(rank) (arXiv 2312.03732).
    """
    return float(alpha) * (math.sqrt(rank) if rslora else 1)


def plain_equivalent(
    plan: Plan, adapter: LoraConfig, optimizer: str, max_grad_norm: float, rate_keys: Sequence[str] = ()
) -> Plain | None:
    """Return the run of plain LoRA that equals this plan; None without such a run.

    `optimizer` is the name of the optimizer's class. `max_grad_norm` is 0 without clipping. `rate_keys` are the keys of
    the config with a smallest rate of the schedule.
    """
    rates = rates_of(plan, adapter)
    if rates is None or rates.init is None or rates.eta_a <= 0 or rates.eta_b <= 0:
        return None
    if rates.init == "Init[1]":
        alpha, lr, changed = adapter.lora_alpha * rates.ratio, rates.eta_a, "lora_B"
    else:
        alpha, lr, changed = adapter.lora_alpha / rates.ratio, rates.eta_b, "lora_A"
    differences = list(_differences(plan, rates, optimizer, max_grad_norm, lr, changed))
    if changed == "lora_A" and rates.ratio != 1:  # optimizer.lr is another one, and the schedule ends at a share of it
        differences += [f"{key}, which would have to be {rates.ratio:g} times as large" for key in rate_keys]
    if adapter.alpha_pattern and rates.ratio != 1:
        differences.append("adapter.alpha_pattern, whose values would change like lora_alpha")
    return Plain(alpha, lr, tuple(differences))


def explain(
    plan: Plan, adapter: LoraConfig, optimizer: str, max_grad_norm: float, rate_keys: Sequence[str] = ()
) -> list[str]:
    """Return lines about the plan's place on the map of rates, its equal run of plain LoRA, and decay.

    The arguments are those of `plain_equivalent`.
    """
    lines = []
    if rates := rates_of(plan, adapter):
        steps = "" if rates.steps_of_a is None else f"; init_A / eta_A = {rates.steps_of_a:.3g} steps"
        alpha = f"{adapter.lora_alpha:g}" + (f" x sqrt({adapter.r})" if adapter.use_rslora else "")
        of = " x sqrt(rank)" if adapter.use_rslora else ""
        lines.append(f"alpha{of} x eta_B = {alpha} x {rates.eta_b:.3g} = {rates.alpha_eta_b:.3g}{steps}")
        plain = plain_equivalent(plan, adapter, optimizer, max_grad_norm, rate_keys)
        if plain is not None and rates.ratio != 1:
            but = f", except for: {'; '.join(plain.differences)}" if plain.differences else ""
            lines.append(f"Equal to plain LoRA with {plain.overrides()}{but}")
    if decay := decay_per_step(plan):
        parts = (f"{name} {part:.3g}" for name, part in decay.items())
        lines.append(f"Rate x weight decay, per step: {', '.join(parts)}")
    return lines


def decay_per_step(plan: Plan) -> dict[str, float]:
    """Return rate x weight decay of each group that decays."""
    return {group.name: group.lr * group.weight_decay for group in plan.groups if group.lr * group.weight_decay}


def _differences(
    plan: Plan, rates: Rates, optimizer: str, max_grad_norm: float, lr: float, changed: str
) -> Iterator[str]:
    """Yield what differs in plain LoRA with one rate, `lr`.

    There, tensors of the role `changed` have another scale.
    """
    if rates.ratio == 1:
        return
    if not is_scale_free(optimizer):
        yield f"{optimizer}, unless its steps don't depend on the gradient's scale"
    elif has_eps(optimizer):
        factor = rates.ratio if changed == "lora_B" else 1 / rates.ratio
        yield f"eps, which would have to be {factor:g} times as large for {changed}"
    if optimizer == "RiemannianAdamW":  # one factor's gradient is divided by the square of the other, plus reg
        other, square = ("lora_A", rates.ratio**-2) if changed == "lora_B" else ("lora_B", rates.ratio**2)
        yield f"reg, which would have to be {square:.3g} times as large for {other}"
    if max_grad_norm:
        yield "clipping (trainer.max_grad_norm), because the norm of all gradients is another one"
    others = [tensor for tensor in plan.tensors if tensor.group.lr != lr]
    if any(tensor.record.role == changed and tensor.group.weight_decay for tensor in others):
        yield f"weight decay, which is rate x decay per step, so {changed} would decay less or more"
    decay = next((tensor.group.weight_decay for tensor in plan.tensors if tensor.rule.weight_decay is None), None)
    if roles := _roles(tensor for tensor in plan.tensors if not _decays_like_plain(tensor, decay)):
        yield f"the weight decay of {roles}"
    if roles := _roles(tensor for tensor in plan.tensors if tensor.group.settings):
        yield f"the optimizer's settings for {roles}"
    # The scale acts on all of LoRA's tensors. The bias of lora_B changes by the same factor as what it is added to.
    of_bias = rates.eta_b if changed == "lora_B" else rates.eta_a
    scaled = [tensor for tensor in plan.tensors if tensor.record.role.startswith("lora_")]
    wrong_bias = any(tensor.record.role == "lora_B_bias" and tensor.group.lr != of_bias for tensor in scaled)
    known = {"lora_A", "lora_B", *([] if wrong_bias else ["lora_B_bias"])}
    if roles := _roles(tensor for tensor in (*scaled, *others) if tensor.record.role not in known):
        yield f"the rate or the scale of {roles}"


def _roles(tensors: Iterable[PlannedTensor]) -> str:
    return ", ".join(sorted({tensor.record.role for tensor in tensors}))


def _decays_like_plain(tensor: PlannedTensor, decay: float | None) -> bool:
    """Return True if a tensor has the weight decay that it has in the preset `none`.

    `decay` is the optimizer's; None if it is unknown.
    """
    if tensor.record.role in _WITHOUT_DECAY or tensor.record.ndim < 2:
        return not tensor.group.weight_decay
    return tensor.rule.weight_decay in (None, decay)
