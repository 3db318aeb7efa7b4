"""The frozen copy of the adapter with which TRL's DPO and KTO trainers compare the trained model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from loraplus_hydra.errors import Problem
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME
from loraplus_hydra.models.adapter import schedule_of

REFERENCE = "ref"  # TRL's name for the copy
_TRAINERS = ("DPOTrainer", "KTOTrainer")


def adds_reference(trainer_class: type) -> bool:
    """Return True if this class is one of TRL's preference trainers with a reference."""
    bases = {base.__name__ for base in trainer_class.__mro__ if base.__module__.startswith("trl.")}
    return bool(bases & set(_TRAINERS))


def reference_problem(model: PeftModel, trainer_class: type) -> Problem | None:
    """Return a Problem if PEFT can't add a second adapter with this config as the reference."""
    if not adds_reference(trainer_class):
        return None
    config, name = model.peft_config[ADAPTER_NAME], trainer_class.__name__
    if (bias := getattr(config, "bias", None) or "none") != "none":
        # PEFT 0.21.2 allows one adapter with biases. They are the base's own, so a copy would have the trained ones.
        what = f"{bias} trains the base's biases, so {name} has no frozen model to compare with"
        return Problem("adapter.bias", what, "use none")
    if schedule_of(type(config)):
        what = f"PEFT allows one adapter of this kind in a model, and {name} compares with a frozen copy of it"
        return Problem("adapter", what, "use adapter=lora, or experiment=orpo, which needs no reference")
    return None


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
