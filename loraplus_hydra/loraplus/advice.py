"""Advice on the LoRA+ ratio for an adapter's initialisation.

Source: LoRA+, arXiv 2402.12354, section 5.3 and appendix: 2^4 on RoBERTa was found with Init[2] (A = 0, B random); with
Init[1] (B = 0, A random), which is PEFT's default, 2^2 to 2^3; 2^1 to 2^2 for Llama-7b.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraplus_hydra.loraplus.rules import TensorRecord

LLAMA_SIZE = 3_000_000_000  # parameters from which the paper's Llama ratios are the nearer ones
PAPER = "arXiv 2402.12354, section 5.3"


def initialisation(records: Sequence[TensorRecord]) -> str | None:
    """Return `Init[1]` where lora_B starts at zero, `Init[2]` where lora_A does, None otherwise.

    None stands for PiSSA and OLoRA, and for an adapter that is trained further: the paper does not cover these.
    """
    zero = {record.role for record in records if record.starts_at_zero}
    if "lora_A" in zero:
        return "Init[2]"
    return "Init[1]" if "lora_B" in zero else None


def ratio_advice(records: Sequence[TensorRecord], ratio: float, total_parameters: int) -> list[str]:
    """Return warnings about a ratio that does not suit the initialisation, a sentence each."""
    init = initialisation(records)
    if ratio == 1 or init is None:
        return []
    if ratio < 1:
        return [f"ratio {ratio:g} makes lora_B slower than lora_A, against the method's point ({PAPER})."]
    if init == "Init[2]" and ratio < 16:
        return [
            f"lora_A starts at zero (Init[2]); the paper's ratio for that start is about 16, not {ratio:g} ({PAPER})."
        ]
    if init == "Init[1]" and total_parameters >= LLAMA_SIZE and ratio > 4:
        return [
            f"ratio {ratio:g} is high for a model of {total_parameters / 1e9:.0f} billion parameters whose lora_B "
            f"starts at zero (Init[1]); the paper found 2 to 4 for Llama-7b ({PAPER})."
        ]
    if init == "Init[1]" and ratio > 8:
        return [
            f"ratio {ratio:g} is high where lora_B starts at zero (Init[1], PEFT's default): the paper found 4 to 8 "
            f"there; its 16 is for Init[2], A = 0 ({PAPER})."
        ]
    return []
