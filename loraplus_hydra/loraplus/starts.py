"""Initialisations of adapters that PEFT's config cannot express."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ADAPTER_NAME = "default"  # PEFT's name for a model's first adapter, and so of every adapter that we train
A_ZERO = "a_zero"  # adapter.init_lora_weights of the paper's Init[2], which PEFT doesn't have
TRAINED = "trained"  # initialisation of an adapter that an earlier run trained


def note_initialisation(model: nn.Module, initialisation: str) -> None:
    """Note on the model that its adapter's initialisation is `A_ZERO` or `TRAINED`."""
    model.adapter_initialisations = {ADAPTER_NAME: initialisation}  # type: ignore[assignment]


def noted_initialisations(model: nn.Module) -> dict[str, str]:
    """Return each adapter's noted initialisation; empty where PEFT's config holds it."""
    return getattr(model, "adapter_initialisations", None) or {}
