"""Initialisations of adapters that PEFT's config cannot express."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


A_ZERO = "a_zero"  # our word for Init[2], in adapter.init_lora_weights


TRAINED = "trained"  # our word for the start of an adapter that goes on with what it learnt before


ADAPTER = "default"


def note_start(model: nn.Module, start: str) -> None:
    """Note on the model that its adapter starts by `A_ZERO` or `TRAINED`, which no PEFT config says."""
    model.adapter_starts = {ADAPTER: start}  # type: ignore[assignment]


def noted_starts(model: nn.Module) -> dict[str, str]:
    """Return the noted start of each adapter; empty where PEFT's config says it all."""
    return getattr(model, "adapter_starts", None) or {}
