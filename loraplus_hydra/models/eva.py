"""EVA's start: A from the main directions of each layer's inputs, arXiv 2410.07170.

`training/hf_trainer/eva.py` measures the directions in a pass over the training rows. Then some layers get a higher
rank than others, and a layer of rank 0 loses its adapter. Before the pass, every layer has the config's rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import UNSUPPORTED_LORA_MODULES
from peft.tuners.tuners_utils import cast_adapter_dtype
from safetensors import SafetensorError

from loraplus_hydra.errors import Problem, UserError, first_line, first_of
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME, EVA, note_initialisation, noted_initialisations
from loraplus_hydra.models.adapter_files import WEIGHTS, StoredAdapter

_SPARE = 2  # PEFT computes this many times the directions that it may use
_PROBE = (2, 3)  # rows and tokens


def awaits_directions(model: PeftModel) -> bool:
    """Return True if the adapter starts by EVA, and its pass over the rows is still to come."""
    start = getattr(model.peft_config[ADAPTER_NAME], "init_lora_weights", None)
    return start == EVA and ADAPTER_NAME not in noted_initialisations(model)


def start_from(model: PeftModel, directions: Mapping[str, torch.Tensor]) -> None:
    """Set ranks and A of all layers from `directions`: name -> matrix, whose number of rows is the rank.

    Layers that EVA doesn't support, such as embeddings, get PEFT's default start from the global random generator.
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
    layers = _layers(model)
    ranks = {name: shapes.get(f"{name}.lora_A.weight", (0,))[0] for name in layers}
    total = sum(layer.r[ADAPTER_NAME] for layer in layers.values())
    if sum(ranks.values()) == total and all(ranks[name] <= _largest_rank(model, layers[name]) for name in layers):
        start_from(model, {name: torch.zeros(ranks[name], layers[name].in_features) for name in layers})


def numbers_needed(model: PeftModel) -> int:
    """Return the number of directions that PEFT computes.

    A batch needs as many tokens, and a layer as many inputs.
    """
    return max(_SPARE * _largest_rank(model, layer) for layer in _layers(model).values())


def eva_problems(model: PeftModel) -> list[Problem]:
    """Return the reasons why EVA can't start the adapter of `model`, which is on the meta device."""
    if not awaits_directions(model):
        return []
    layers = _layers(model)
    if not layers:
        return [Problem("adapter.target_modules", "EVA starts linear layers, but none is adapted", "use all-linear")]
    problems = []
    narrow = min(layers, key=lambda name: layers[name].in_features)
    if (needed := numbers_needed(model)) > (inputs := layers[narrow].in_features):
        what = f"EVA computes 2 x r x rho = {needed} directions, but {_own(narrow)} has only {inputs} inputs"
        problems.append(Problem("adapter.r", what, "use a lower adapter.r or adapter.eva_config.rho"))
    if apart := [_own(name) for name in _without_tokens(model, layers)]:
        problems.append(without_tokens_problem(apart))
    return problems


def without_tokens_problem(names: list[str]) -> Problem:
    """Return the Problem of adapted layers whose inputs don't belong to tokens, such as a pooler's."""
    what = f"EVA needs the inputs of a layer for each token, but {first_of(names, 2)} has other inputs"
    fix = f"leave out such layers: +adapter.exclude_modules=[{','.join(names)}]"
    return Problem("adapter.target_modules", what, fix)


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the layers that EVA can start, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, UNSUPPORTED_LORA_MODULES)
    }


def _largest_rank(model: PeftModel, layer: LoraLayer) -> int:
    """Return the largest rank that the layer can get."""
    return round(layer.r[ADAPTER_NAME] * model.peft_config[ADAPTER_NAME].eva_config.rho)


def _without_tokens(model: PeftModel, layers: Mapping[str, LoraLayer]) -> list[str]:
    """Return the layers that don't get a vector for each token, from a forward pass without weights."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        return lambda _, inputs: None if inputs[0].shape[:-1] == _PROBE else found.append(name)

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        # A model's own code can fail in many ways without weights; then the pass itself finds such layers
        with suppress(Exception), torch.no_grad():
            model(input_ids=torch.zeros(_PROBE, dtype=torch.long, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _own(name: str) -> str:
    """Return a layer's name in the base model."""
    return name.removeprefix("base_model.model.")
