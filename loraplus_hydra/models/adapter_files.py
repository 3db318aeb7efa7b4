"""Adapters saved and loaded in PEFT's layout, from safetensors only."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplus_hydra.config.locations import is_local, model_location
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line, refuse
from loraplus_hydra.io.files import remove, write_text
from loraplus_hydra.io.folders import refuse_links
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.io.read import Unreadable, read_json, refuse_large
from loraplus_hydra.io.run_folder import ADAPTER
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME, EVA
from loraplus_hydra.models.initialisation import convert_to_original_base
from loraplus_hydra.models.patterns import refuse_slow_patterns

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY = "adapter.path"
# Fields that make PEFT read other files, or import a package, while it builds the adapter.
_LEADING_ELSEWHERE = ("megatron_config", "prompt_tuning_init_state_dict_path", "adapters", "shadow_model")
_PART = 2**22  # number of elements that are compared at a time
_ANY_RANK = 65_536  # far larger than any rank in use
_ANY_SIZE = 2**26  # maximum number of elements; adapters of this size fit any model
_SAFETENSORS_ONLY = "only safetensors are read, because a pickle can run code"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk: its folder and its PEFT config."""

    folder: Path
    config: PeftConfig

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor. Only the file's header is read."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def numbers(self) -> int:
        """Return the number of elements in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def not_finite(self) -> str | None:
        """Return the name of the first tensor with a number that isn't finite, or None."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                # In parts, because the comparison would need as much memory as the tensor.
                parts = file.get_tensor(name).flatten().split(_PART)
                if not all(part.isfinite().all() for part in parts):
                    return str(name)
        return None


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, whole: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter, its tokenizer and the base's config.json into `folder`.

    `whole` are the adapter's tensors by name, if `model` has only parts of them. The files fit the original base, also
    for an initialisation that changes the base. For a classifier, config.json also has the names of the labels.
    """
    save_factors(model, folder, state_dict=whole)
    initial = getattr(model, "initial_factors", None)
    if initial:
        stored = PeftConfig.from_pretrained(str(folder))
        tensors, config = convert_to_original_base(load_file(folder / WEIGHTS), initial, stored)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(folder))
        _tidy_config(folder, config)
    save_base_config(model, folder)
    tokenizer.save_pretrained(str(folder))


def save_base_config(model: PeftModel, folder: Path) -> None:
    """Write the base's config.json, with the names of a classifier's labels, into `folder`."""
    config = model.get_base_model().config
    use_cache, config.use_cache = config.use_cache, True  # the cache was only switched off for training
    config.save_pretrained(str(folder))
    config.use_cache = use_cache


def save_factors(model: PeftModel, folder: Path, **arguments: Any) -> None:
    """Write the trained tensors into `folder`. `arguments` are passed to PEFT's `save_pretrained`."""
    model.save_pretrained(
        str(folder),
        safe_serialization=True,
        # PEFT would also store the base's embedding if it has LoRA or new rows. But the embedding is frozen, and new
        # rows are stored as tensors of the adapter.
        save_embedding_layers=False,
        selected_adapters=[ADAPTER_NAME],  # without DPO's frozen reference, which is a second adapter
        **arguments,
    )
    _tidy_config(folder, model.peft_config[ADAPTER_NAME])
    remove(folder / "README.md")  # PEFT's card has only placeholders; `export` writes a card with real values


def _tidy_config(folder: Path, config: PeftConfig) -> None:
    """Sort lists in `folder`'s config that PEFT makes from sets, and leave out EVA's start.

    The order of a set depends on PYTHONHASHSEED. EVA's start has been made, so the adapter is a plain LoRA.
    """
    stored = read_json(folder / CONFIG)
    if stored.get("init_lora_weights") == EVA:
        stored |= {"init_lora_weights": True, "eva_config": None}
    for name, value in vars(config).items():
        if isinstance(value, set) and name in stored:
            stored[name] = sorted(value)
    write_text(folder / CONFIG, json.dumps(stored, indent=2, sort_keys=True))


def stored_adapter(path: str, key: str = KEY) -> StoredAdapter:
    """Open the adapter at `path`: an adapter's folder, a run's folder, or a hub name.

    The adapter is untrusted. None of its code is run, and only its config and its safetensors are read. Raises
    ConfigErrors at `key`.
    """
    folder = adapter_folder(path, key)
    refuse_links(folder, key, reading=True)  # checked before other libraries open the files
    try:
        refuse_large((folder / CONFIG, folder / "config.json"))
    except Unreadable as error:
        raise ConfigErrors([Problem(key, str(error), "name another adapter")]) from None
    stored = StoredAdapter(folder, _read_config(folder / CONFIG, key))
    try:
        shapes, broken = stored.shapes(), stored.not_finite()
    except (SafetensorError, OSError, RuntimeError) as error:
        what = f"{folder / WEIGHTS} can't be read: {first_line(error)}"
        raise ConfigErrors([Problem(key, what, _SAFETENSORS_ONLY)]) from error
    unsafe = [f"{folder / CONFIG}: {what}" for what in _unsafe_fields(stored.config, shapes)]
    if broken is not None:
        unsafe.append(f"{folder / WEIGHTS}: {broken} has numbers that aren't finite")
    refuse(Problem(key, what, "use another adapter") for what in unsafe)
    return stored


def attach(model: PreTrainedModel, stored: StoredAdapter, *, trainable: bool = False) -> PeftModel:
    """Add a stored adapter to `model` and load its tensors. Raises UserError if they don't fit."""
    refuse_slow_patterns(stored.config, model)
    numbers, most = stored.numbers(), 2 * model.num_parameters() + _ANY_SIZE
    if numbers > most:  # PEFT would load all tensors before it compares names and shapes
        raise UserError(f"the adapter in {stored.folder} doesn't fit the model: it has {numbers:,} numbers")
    stored.config.inference_mode = not trainable
    # PEFT would load the tokenizer that the config names
    if getattr(stored.config, "prompt_tuning_init", None) == "TEXT":
        stored.config.prompt_tuning_init = type(stored.config.prompt_tuning_init)("RANDOM")
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(stored.folder), is_trainable=trainable, config=stored.config)
    except Exception as error:  # PEFT raises many types for a config or tensors of another model
        raise UserError(f"the adapter in {stored.folder} doesn't fit the model: {first_line(error)}") from error
    if misfit := first_misfit(adapted, stored, names_only=True):
        raise UserError(f"the adapter in {stored.folder} doesn't fit the model: {misfit}")
    return adapted


def load_tensors(adapted: PeftModel, folder: Path) -> None:
    """Load the tensors in `folder` into an adapted model. Raises UserError if they don't fit."""
    refuse_other_tensors(folder, adapted)
    set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS), adapter_name=ADAPTER_NAME)


def refuse_other_tensors(folder: Path, adapted: PeftModel) -> None:
    """Raise UserError if the tensors in `folder` and in `adapted` differ in names or shapes."""
    try:
        misfit = first_misfit(adapted, StoredAdapter(folder, PeftConfig()))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS} can't be read: {first_line(error)}") from None
    if misfit:
        raise UserError(f"{folder / WEIGHTS} doesn't belong to this run: {misfit}")


def first_misfit(adapted: PeftModel, stored: StoredAdapter, *, names_only: bool = False) -> str:
    """Describe the first tensor that is missing, or has another shape, in the model or in the file.

    Empty if all tensors fit. With `names_only`, shapes are not compared.
    """
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    model = {name: tuple(tensor.shape) for name, tensor in state.items()}
    # The base's own tensors are compared only if they are trained (biases). PEFT may have stored a frozen embedding,
    # too.
    file = {name: shape for name, shape in stored.shapes().items() if ".base_layer." not in name or name in model}
    for name in sorted(model.keys() ^ file.keys() if names_only else model.keys() | file.keys()):
        if model.get(name) != file.get(name):
            return f"{name} is {file.get(name, 'missing')} in the adapter, but {model.get(name, 'missing')} in this run"
    return ""


def adapter_folder(path: str, key: str = KEY) -> Path:
    """Return the folder of the adapter at `path`. A hub's adapter is downloaded first."""
    folder = Path(model_location(path)) if is_local(path) else _fetch(path, key)
    # An adapter's folder may hold another adapter: `cp -r A/adapter B/adapter` makes B/adapter/adapter
    if not (folder / CONFIG).is_file() and (folder / ADAPTER / CONFIG).is_file():
        folder = folder / ADAPTER
    if not (folder / CONFIG).is_file():
        raise ConfigErrors([Problem(key, f"there is no {CONFIG} in {folder}", "give an adapter's folder, or a run's")])
    if not (folder / WEIGHTS).is_file():
        raise ConfigErrors([Problem(key, f"there is no {WEIGHTS} in {folder}", _SAFETENSORS_ONLY)])
    return folder


def _fetch(path: str, key: str) -> Path:
    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        what = f"{path}: {first_line(error)}"
        raise ConfigErrors([Problem(key, what, "give an adapter's folder, or an adapter on the hub")]) from error


def _read_config(file: Path, key: str) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(str(file.parent))
        reason = "" if config.peft_type else "its peft_type is not a method of PEFT"
    except Exception as error:  # PEFT doesn't validate the file, and raises many types for a broken file
        reason = first_line(error)
    if reason:
        raise ConfigErrors([Problem(key, f"{file} can't be read: {reason}", "use another adapter")])
    return config


def _unsafe_fields(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Return a text for each field that names other files or packages, or needs too much memory."""
    found = [f"{name} is a path outside the folder" for name in _LEADING_ELSEWHERE if getattr(config, name, None)]
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    patterns = getattr(config, "rank_pattern", None)
    sizes = {name: getattr(config, name, None) for name in ("r", "num_virtual_tokens")}
    sizes |= {f"rank_pattern.{name}": size for name, size in (patterns.items() if isinstance(patterns, dict) else ())}
    for name, size in sizes.items():
        if isinstance(size, (int, float)) and not 0 <= size <= max(largest, _ANY_RANK):
            found.append(f"{name} is {size}, but the largest dimension of the adapter's tensors is {largest}")
    return found
