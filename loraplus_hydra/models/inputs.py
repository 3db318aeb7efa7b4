"""Fingerprints of the files from which a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.config.locations import model_location
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import fingerprints
from loraplus_hydra.io.read import Unreadable, read_json
from loraplus_hydra.models.adapter_files import CONFIG, WEIGHTS, adapter_folder

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
# Entries of a config that only have its path and the version that wrote it.
_NOT_CONTENT = ("_name_or_path", "transformers_version", "base_model_name_or_path", "revision", "peft_version")
# The files of an adapter's folder that commands read. They don't read others, such as a README.
READ_OF_ADAPTER = (".json", ".safetensors", ".jinja", ".model", ".txt")


def base_fingerprints(model: DictConfig) -> dict[str, str]:
    """Return the fingerprints of the base model's weights and config.json.

    A file that is not on this machine has no fingerprint.
    """
    found = {}
    try:
        if (config := _file(model, "config.json")) is not None:
            found["config.json"] = _of_json(config)
        if files := _weight_files(model):
            found["weights"] = fingerprints.of_weights(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # the error is reported when the model is loaded
    return found


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the fingerprint of a tokenizer: vocabulary, rules, special tokens, chat template and limits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if backend is not None:  # these two settings change when the tokenizer is used
        rules.pop("truncation", None)
        rules.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    limits = [tokenizer.model_max_length, tokenizer.truncation_side, tokenizer("a").input_ids]
    return fingerprints.of_content([rules, special, tokenizer.chat_template, limits])


def adapter_fingerprint(path: str) -> str:
    """Return the fingerprint of an adapter that training begins from. Raises UserError."""
    folder = adapter_folder(path)
    try:
        return fingerprints.of_content([_of_json(folder / CONFIG), fingerprints.of_weights([folder / WEIGHTS])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / WEIGHTS} can't be read: {error}") from error


def folder_fingerprint(adapter: Path) -> str:
    """Return the fingerprint of the folder with a run's adapter and tokenizer."""
    files = (file for file in adapter.iterdir() if file.suffix in READ_OF_ADAPTER and file.name != CONFIG)
    count, _, digest = fingerprints.of_files(file for file in files if file.is_file()).rpartition(" ")
    return f"{count} {fingerprints.of_content([digest, _of_json(adapter / CONFIG)])}"


def _weight_files(model: DictConfig) -> list[Path]:
    if (single := _file(model, MODEL)) is not None:
        return [single]
    if (index := _file(model, INDEX)) is None:
        return []
    shards = [_file(model, name) for name in sorted(set(read_json(index.resolve())["weight_map"].values()))]
    # An interrupted download has no fingerprint. It would differ from that of all shards.
    return [] if None in shards else [shard for shard in shards if shard is not None]


def _file(model: DictConfig, name: str) -> Path | None:
    """Return the path of a model's file, in its folder or in the hub's cache.

    None if the file isn't on this machine.
    """
    folder = Path(model_location(model.path))
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = try_to_load_from_cache(model.path, name, revision=model.revision)
    # Otherwise it was never downloaded, or doesn't exist on the hub
    return Path(found) if isinstance(found, str) else None


def _of_json(file: Path) -> str:
    try:
        stored: Mapping[str, Any] = read_json(file.resolve())
    except Unreadable:
        return "unreadable"
    return fingerprints.of_content({name: value for name, value in stored.items() if name not in _NOT_CONTENT})
