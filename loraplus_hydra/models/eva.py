"""EVA's start: A from the main directions of each layer's inputs, arXiv 2410.07170.

`training/hf_trainer/eva.py` measures the directions in a pass over the training rows. Then some layers get a higher
rank than others, and a layer of rank 0 loses its adapter. Before the pass, every layer has the config's rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import UNSUPPORTED_LORA_MODULES
from peft.tuners.tuners_utils import cast_adapter_dtype
from safetensors import SafetensorError

from loraplus_hydra.errors import Problem, UserError, first_line
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME, EVA, note_initialisation, noted_initialisations
from loraplus_hydra.models.adapter_files import WEIGHTS, StoredAdapter

_SPARE = 2  # PEFT computes this many times the directions that it may use


def awaits_directions(model: PeftModel) -> bool:
    """Return True if the adapter starts by EVA, and its pass over the rows is still to come."""
    start = getattr(model.peft_config[ADAPTER_NAME], "init_lora_weights", None)
    return start == EVA and ADAPTER_NAME not in noted_initialisations(model)


def start_from(model: PeftModel, directions: Mapping[str, torch.Tensor]) -> None:
    """Set ranks and A of all layers from `directions`: name -> matrix, whose number of rows is the rank.

    Layers without directions, such as embeddings, get PEFT's default start from the global random generator.
    """
    config = model.peft_config[ADAPTER_NAME]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the following layers were initialized with init_lora_weights=True")
        initialize_lora_eva_weights(model, eva_state_dict=dict(directions), adapter_name=ADAPTER_NAME)
    # PEFT 0.21.2 shortens these names to suffixes, which can also fit layers of rank 0
    config.target_modules = {
        name
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.r
    }
    note_initialisation(model, EVA)
    cast_adapter_dtype(model, ADAPTER_NAME)  # PEFT makes factors of another rank in the base's dtype


def take_ranks(model: PeftModel, folder: Path) -> None:
    """Give all layers of a model that awaits directions the ranks that the checkpoint in `folder` has.

    The checkpoint's tensors are not loaded. If their ranks are not those of a start with the model's config, nothing is
    changed. Raises UserError if the file can't be read.
    """
    try:
        shapes = StoredAdapter(folder, PeftConfig()).shapes()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS} can't be read: {first_line(error)}") from None
    layers = linear_layers(model)
    ranks = {name: shapes.get(f"{name}.lora_A.weight", (0,))[0] for name in layers}
    total = sum(layer.r[ADAPTER_NAME] for layer in layers.values())
    if sum(ranks.values()) == total and max(ranks.values()) <= _largest_rank(model):
        start_from(model, {name: torch.zeros(ranks[name], layers[name].in_features) for name in layers})


def numbers_needed(model: PeftModel) -> int:
    """Return the number of directions that PEFT computes.

    A batch needs as many tokens, and a layer as many inputs.
    """
    return _SPARE * _largest_rank(model)


def eva_problems(model: PeftModel) -> list[Problem]:
    """Return the reasons why EVA can't start the adapter of `model`, which is on the meta device."""
    if not awaits_directions(model):
        return []
    layers = linear_layers(model)
    if not layers:
        return [Problem("adapter.target_modules", "EVA starts linear layers, but none is adapted", "use all-linear")]
    narrow = min(layers, key=lambda name: layers[name].in_features)
    if (needed := numbers_needed(model)) > (inputs := layers[narrow].in_features):
        what = f"EVA computes 2 x r x rho = {needed} directions, but {own_name(narrow)} has only {inputs} inputs"
        return [Problem("adapter.r", what, "use a lower adapter.r or adapter.eva_config.rho")]
    return []


def linear_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the layers that EVA can start, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, UNSUPPORTED_LORA_MODULES)
    }


def own_name(name: str) -> str:
    """Return a layer's name in the base model."""
    return name.removeprefix("base_model.model.")


def _largest_rank(model: PeftModel) -> int:
    """Return the largest rank that a layer can get."""
    ranks = (layer.r[ADAPTER_NAME] for layer in linear_layers(model).values())
    return round(max(ranks) * model.peft_config[ADAPTER_NAME].eva_config.rho)
