"""Advice on LoRA+ rates for an adapter's initialisation and a model's width.

Sources: LoRA+, arXiv 2402.12354, section 5.3 and appendix: the best ratio on RoBERTa was 2^4 with Init[2] (A = 0, B
random), and 2^2 to 2^3 with Init[1] (B = 0, A random), PEFT's default. And the rule for LoRA's rate of tinker-cookbook
(`hyperparam_utils.py`, Thinking Machines): 5e-4 x (2000 / hidden size)^P at alpha 32, for any rank. With Init[1], alpha
and the rate of B matter only through their product (see `invariance`), so the rule is one for alpha x eta_B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraplus_hydra.loraplus.rules import TensorRecord

PAPER = "arXiv 2402.12354, section 5.3"
REGRET = "LoRA Without Regret, Thinking Machines 2025"
RULE = "tinker-cookbook's rule for LoRA's rate"
HIGH = 3  # above this multiple of the rule's alpha x eta_B, the built-in example gets worse (docs/numbers/measured.md)
LARGE_BATCH = 32  # rows a step
SHORT = 100  # steps
USUAL_RANK = 8  # of PEFT's LoraConfig, and of conf/adapter/lora.yaml
SMALLEST_OF_A_ZERO = 10  # ratio of the authors' GPT-2 runs, which start with A = 0 (conf/experiment/paper_gpt2.yaml)
_ATTENTION = re.compile(r"att(n|ention)\b", re.IGNORECASE)  # in a layer's name: self_attn, attention, SelfAttention
# LoRA's best rate with a start, as a multiple of the best one with PEFT's usual start (arXiv 2602.04998)
_START_FACTORS = {"True": 1.0, "gaussian": 1.0, "pissa": 1 / 10, "olora": 1 / 18}
_POWERS = {"llama": 0.781, "qwen": 0.0775}  # P for each family of models; Llama's is a guess for other families


def initialisation(records: Sequence[TensorRecord]) -> str | None:
    """Return `Init[1]` if lora_B starts at zero, `Init[2]` if lora_A starts at zero, otherwise None.

    The result is None for PiSSA, OLoRA and an already trained adapter, because the paper does not cover these.
    """
    zero = {record.role for record in records if record.starts_at_zero}
    if "lora_A" in zero:
        return "Init[2]"
    return "Init[1]" if "lora_B" in zero else None


def published_product(model_type: str, hidden_size: int) -> float:
    """Return alpha x eta_B of the published rule for a causal model."""
    power = _POWERS["qwen" if model_type.startswith("qwen") else "llama"]
    return 32 * 5e-4 * float((2000 / hidden_size) ** power)


def is_family_of_rule(model_type: str) -> bool:
    """Return True if the published rule was fitted to this family of models."""
    return model_type.startswith(tuple(_POWERS))


def start_factor(init_lora_weights: str) -> float | None:
    """Return the factor of the best rate for a start; None if it is unknown."""
    return _START_FACTORS.get("pissa" if init_lora_weights.startswith("pissa_niter_") else init_lora_weights)


def rate_advice(
    records: Sequence[TensorRecord], ratio: float, product: float | None, published: float | None
) -> list[str]:
    """Return warnings, one sentence each, about rates that do not suit the initialisation.

    `product` is alpha x eta_B, and `published` the rule's; None if unknown.
    """
    init = initialisation(records)
    if not any(record.role == "lora_A" for record in records):  # a ratio is one of two rates
        return []
    if init is not None and ratio < 1:
        return [f"ratio {ratio:g} gives lora_B a smaller rate than lora_A; LoRA+ needs a larger one ({PAPER})."]
    if init == "Init[2]" and 1 < ratio < SMALLEST_OF_A_ZERO:
        return [f"lora_A starts at zero (Init[2]); the paper's ratio for Init[2] is about 16, not {ratio:g} ({PAPER})."]
    if init == "Init[1]" and product is not None and published is not None and product > HIGH * published:
        return [
            f"alpha x eta_B = {product:.3g} is {product / published:.2g} times the {published:.2g} of {RULE} for this "
            "model; training may be unstable: lower optimizer.lr, loraplus.ratio or adapter.lora_alpha."
        ]
    return []


def optimizer_note(optimizer: str, rates_of_b: Sequence[float]) -> str:
    """Return what the ratio means with this optimizer's class; empty if it means what it does with Adam.

    `rates_of_b` are the rates of lora_B.
    """
    if optimizer == "LoraFA":
        rates = ", ".join(f"{rate:.3g}" for rate in rates_of_b)
        return (
            "LoRA-FA doesn't train lora_A, so a ratio means nothing by itself: only lora_B's rate counts, which is "
            f"{rates}, whether a ratio or a rate of its own sets it."
        )
    if optimizer == "RiemannianAdamW":
        return (
            "Riemannian preconditioning makes a plain step independent of the scale between lora_A and "
            "lora_B, but AdamW divides each element by its size afterwards. So both steps are as large as the rates, "
            "and the ratio means what it does with AdamW (docs/explained/invariance.md)."
        )
    return ""


def short_run_notes(steps: int | None) -> list[str]:
    """Return a note on the best rate of a run with few steps."""
    if steps is None or steps >= SHORT:
        return []
    return [f"{steps} steps: the best rate of a short run is about 1.5 times that of a long one ({REGRET})."]


def setting_notes(
    records: Sequence[TensorRecord], *, rows_per_step: int, steps: int | None, rank: int | None
) -> list[str]:
    """Return notes, one sentence each, on settings that change the best rate or LoRA's quality.

    `rows_per_step` is the effective batch. `steps` and `rank` are None if they are unknown, or if layers have several.
    """
    notes = []
    if rows_per_step > LARGE_BATCH:
        notes.append(f"{rows_per_step} rows a step: large batches hurt LoRA more than full training ({REGRET}).")
    notes += short_run_notes(steps)
    if rank not in (None, USUAL_RANK):
        notes.append(f"rank {rank}: the best rate hardly depends on the rank, if alpha stays the same ({REGRET}).")
    adapted = [record.name for record in records if record.role == "lora_A"]
    if adapted and all(_ATTENTION.search(name) for name in adapted):
        notes.append(f"LoRA is on attention alone: adapter.target_modules=all-linear learns better ({REGRET}).")
    return notes
