"""The frozen copy of the adapter with which TRL's DPO and KTO trainers compare the trained model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME

REFERENCE = "ref"  # TRL's name for the copy


@contextmanager
def exact_reference(model: Any) -> Iterator[None]:
    """Make the reference that a Trainer's constructor adds to `model` an exact copy of the adapter.

    TRL 1.16 adds an adapter with the same config, and copies only tensors whose names contain `.default.`.
    """
    if not isinstance(model, PeftModel) or REFERENCE in model.peft_config:
        yield
        return
    config: Any = model.peft_config.get(ADAPTER_NAME)
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str):
        # The copy needs no start of its own. PiSSA's and OLoRA's would change the base a second time.
        config.init_lora_weights = True
    try:
        yield
    finally:
        if isinstance(start, str):
            config.init_lora_weights = start
    if REFERENCE in model.peft_config:
        _copy_rest(model)


def _copy_rest(model: PeftModel) -> None:
    """Copy tensors whose names end in the adapter's name: embeddings, rows of tokens, VeRA's vectors."""
    for name, parameter in model.named_parameters():
        if name.endswith(f".{ADAPTER_NAME}"):
            with torch.no_grad():
                model.get_parameter(name.removesuffix(ADAPTER_NAME) + REFERENCE).copy_(parameter)
