"""Initialisations of LoRA's factors: the paper's Init[2], PiSSA and OLoRA.

PiSSA and OLoRA move a part of each weight W into A0 and B0, and leave W - s B0 A0 in the base. So their adapter is
valid only for that changed base. For the original base, the same model is W + s (B A - B0 A0): a plain LoRA of twice
the rank.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.loraplus.peft_layers import A_ZERO, ADAPTER_NAME, note_initialisation

# The name of a factor's parameter. Factors of linear layers are modules, and those of embeddings are parameters.
_FACTOR = re.compile(rf"(?P<layer>.+)\.(?P<factor>lora_(embedding_)?[AB])\.{ADAPTER_NAME}(?P<weight>(\.weight)?)")


def changes_base(init_lora_weights: Any) -> bool:
    """Return True if this initialisation changes the base's weights."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(("pissa", "olora"))


def refuse_shared_weights(model: PeftModel) -> None:
    """Raise ConfigErrors if PiSSA or OLoRA has changed a weight that another layer also uses.

    The other layer would be changed, too, so the model would not start as its base, and no adapter could store it. The
    usual cases are an output layer tied to the embedding, and replicated layers.
    """
    users: dict[int, list[str]] = {}
    layers = []
    for name, module in model.get_base_model().named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), nn.Embedding):
            layers.append((name, getattr(module.get_base_layer(), "weight", None)))
    for name, weight in layers:
        others = [user for user in users.get(id(weight), ()) if user != name]
        if others:
            what = f"this start changes the weight of {name}, which is also the weight of {others[0]}"
            fix = f"use true, or don't adapt {name} (adapter.target_modules, adapter.layer_replication)"
            raise ConfigErrors([Problem("adapter.init_lora_weights", what, fix)])


def initialise_a_zero(model: nn.Module) -> None:
    """Initialise the factors by Init[2] of the LoRA+ paper: A is zero, B is random.

    B gets PEFT's default distribution of A: uniform within +-1/sqrt(fan in). B's fan in is the rank, for a convolution
    multiplied by the kernel's size. PEFT stores the factors of fused experts in one matrix, but an expert uses only
    its own part. LoRA on embeddings stays unchanged, because PEFT already makes A zero and B random.

    Random numbers come from the global generator, which the caller must seed.
    """
    found = False
    for module in model.modules():
        lora_A, lora_B = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
        if ADAPTER_NAME in lora_A and hasattr(lora_A[ADAPTER_NAME], "weight"):
            nn.init.zeros_(lora_A[ADAPTER_NAME].weight)
            nn.init.kaiming_uniform_(lora_B[ADAPTER_NAME].weight, a=math.sqrt(5))
            lora_B[ADAPTER_NAME].weight.data *= math.sqrt(getattr(module, "num_experts", 1))
            found = True
    if not found:
        what = "a_zero initialises LoRA's factors, but this adapter has no such factors"
        raise ConfigErrors([Problem("adapter.init_lora_weights", what, "use true")])
    note_initialisation(model, A_ZERO)


def copy_factors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return CPU copies of all LoRA factors, by their names in PEFT's files.

    PEFT cuts factors whose rank is larger than a side of the weight. Zeros are added to a copy, so that the factor and
    its copy together have twice the rank of the config.
    """
    found = {}
    for in_file, parameter, layer in _factors(model):
        factor, dim = parameter.detach().to("cpu", copy=True), _rank_dim(in_file)
        shape = list(factor.shape)
        shape[dim] = 2 * (layer.r[ADAPTER_NAME] - shape[dim])
        found[in_file] = torch.cat([factor, factor.new_zeros(shape)], dim=dim)
    return found


@contextmanager
def as_base(model: PeftModel) -> Iterator[None]:
    """Let the model answer like its base inside the block, also if its start has changed the base."""
    initial = getattr(model, "initial_factors", None)
    if not initial:
        with model.disable_adapter():
            yield
        return
    kept = []
    with torch.no_grad():
        for in_file, parameter, _ in _factors(model):  # the changed base with the start is the original base
            kept.append((parameter, parameter.clone()))
            dim = _rank_dim(in_file)
            parameter.copy_(initial[in_file].narrow(dim, 0, parameter.shape[dim]))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, trained in kept:
                parameter.copy_(trained)


def _factors(model: PeftModel) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Yield each LoRA factor's name in PEFT's files, the factor, and its layer."""
    for name, parameter in model.named_parameters():
        if match := _FACTOR.fullmatch(name):
            layer = model.get_submodule(match["layer"])
            yield f"{match['layer']}.{match['factor']}{match['weight']}", parameter, layer


def convert_to_original_base(
    tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig
) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Convert an adapter whose initialisation changed the base into a plain LoRA of twice the rank.

    The result fits the original base. `tensors` are the tensors of the adapter's file. `initial` are the `copy_factors`
    from before training.
    """
    # PEFT's own conversion treats A and B in the same way, but drops all other tensors: a classification head, DoRA's
    # magnitudes, new tokens.
    converted = dict(tensors)
    for name, factor in initial.items():
        before = factor.to(tensors[name].dtype)
        dim = _rank_dim(name)
        converted[name] = torch.cat([tensors[name].cpu(), -before if dim else before], dim=dim)
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    # The update is scaled by alpha / sqrt(r) or alpha / r, and r is doubled
    growth = math.sqrt(2) if config.use_rslora else 2
    plain.r, plain.lora_alpha = 2 * config.r, _number(growth * config.lora_alpha)
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: _number(growth * alpha) for key, alpha in (config.alpha_pattern or {}).items()}
    return converted, plain


def _rank_dim(name: str) -> int:
    """Return which dimension of a factor is the rank: the first of A, the second of B."""
    return 0 if re.search(r"\.lora_(embedding_)?A(\.|$)", name) else 1


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
