"""Advice on the LoRA+ ratio for an adapter's initialisation.

Source: LoRA+, arXiv 2402.12354, section 5.3 and appendix. The best ratio on RoBERTa was 2^4 with Init[2] (A = 0, B
random), and 2^2 to 2^3 with Init[1] (B = 0, A random), PEFT's default. On Llama-7b it was 2^1 to 2^2.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraplus_hydra.loraplus.rules import TensorRecord

LLAMA_SIZE = 3_000_000_000  # parameters; from this size on, the paper's ratios for Llama apply
PAPER = "arXiv 2402.12354, section 5.3"


def initialisation(records: Sequence[TensorRecord]) -> str | None:
    """Return `Init[1]` if lora_B starts at zero, `Init[2]` if lora_A starts at zero, otherwise None.

    The result is None for PiSSA, OLoRA and an already trained adapter, because the paper does not cover these.
    """
    zero = {record.role for record in records if record.starts_at_zero}
    if "lora_A" in zero:
        return "Init[2]"
    return "Init[1]" if "lora_B" in zero else None


def ratio_advice(records: Sequence[TensorRecord], ratio: float, total_parameters: int) -> list[str]:
    """Return warnings, one sentence each, about a ratio that does not suit the initialisation."""
    init = initialisation(records)
    if ratio == 1 or init is None:
        return []
    if ratio < 1:
        return [f"ratio {ratio:g} gives lora_B a smaller rate than lora_A; LoRA+ needs a larger one ({PAPER})."]
    if init == "Init[2]" and ratio < 16:
        return [f"lora_A starts at zero (Init[2]); the paper's ratio for Init[2] is about 16, not {ratio:g} ({PAPER})."]
    if init == "Init[1]" and total_parameters >= LLAMA_SIZE and ratio > 4:
        return [
            f"ratio {ratio:g} is high for a model of {total_parameters / 1e9:.0f} billion parameters with Init[1] "
            f"(lora_B starts at zero); the paper's ratio for Llama-7b is 2 to 4 ({PAPER})."
        ]
    if init == "Init[1]" and ratio > 8:
        return [
            f"ratio {ratio:g} is high for Init[1] (lora_B starts at zero, PEFT's default); the paper's ratio for "
            f"Init[1] is 4 to 8, and 16 is for Init[2] (lora_A starts at zero) ({PAPER})."
        ]
    return []
