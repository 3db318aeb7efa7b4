"""Properties that a base model's weights decide.

These are the labels of a trained head, its new layers, and the number of tokens that the model can take.
"""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from loraplus_hydra.io.read import read_json, read_or
from loraplus_hydra.loraplus.roles import mark_new_head
from loraplus_hydra.models.adapter_files import stored_adapter
from loraplus_hydra.models.base_model import REDRAWN, architecture, meta_model

_CLASSIFIER = "ForSequenceClassification"
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe", "embeddings_positions")


def is_classifier(config: DictConfig) -> bool:
    """Return True if a run's model classifies texts."""
    return str(config.task.auto_class).endswith(_CLASSIFIER)


def trained_head(model: DictConfig) -> tuple[int, tuple[str, ...]]:
    """Return the number of outputs of the base's trained classification head, and their names.

    Without a head the number is 0. The placeholders LABEL_0, LABEL_1, ... are not names. Raises ConfigErrors.
    """
    config = architecture(model)
    if not any(str(name).endswith(_CLASSIFIER) for name in config.architectures or ()):
        return 0, ()
    return len(config.id2label), label_names(config.id2label)


def mark_new_layers(model: PreTrainedModel, config: DictConfig) -> None:
    """Mark the layers of a classifier's head that a run trains from a random start.

    `model` is the run's base model before PEFT wraps it. Only the run's config and the model's config.json decide, so
    the marks are the same without weights, and when a run is resumed or evaluated. Raises ConfigErrors.
    """
    if not is_classifier(config) or config.adapter.get("path"):  # a stored adapter has its trained head
        return
    trained = _trained_shapes(config)
    body = set(model.base_model.modules())
    for name, layer in model.named_modules():
        own = layer.named_parameters(recurse=False)
        if layer not in body and any(trained.get(f"{name}.{key}") != tensor.shape for key, tensor in own):
            mark_new_head(layer)


def _trained_shapes(config: DictConfig) -> dict[str, torch.Size]:
    """Return the shapes of the base's tensors, without replaced layers; empty without a trained head."""
    if not trained_head(config.model)[0]:
        return {}
    replaced = REDRAWN if config.task.get("new_head") else ()
    base = meta_model(config.model, config.task.auto_class)
    return {name: each.shape for name, each in base.named_parameters() if name.partition(".")[0] not in replaced}


def adapter_labels(path: str) -> tuple[str, ...]:
    """Return the names of the labels of a stored adapter's head; empty without a head.

    The names are in the config.json in the adapter's folder. Raises ConfigErrors if the adapter can't be read.
    """
    # PEFT itself stores no config.json.
    names = read_or({}, read_json, stored_adapter(path).folder / "config.json").get("id2label")
    return label_names(names) if isinstance(names, dict) else ()


def label_names(id2label: dict[Any, Any]) -> tuple[str, ...]:
    """Return the names in the order of their numbers.

    The result is empty for transformers' placeholders LABEL_0, LABEL_1, ...
    """
    names = {int(number): str(name) for number, name in id2label.items()}
    placeholders = all(name == f"LABEL_{number}" for number, name in names.items())
    return () if placeholders else tuple(names[number] for number in sorted(names))


def positions(model: DictConfig, auto_class: str) -> int | None:
    """Return the maximum number of tokens of a model with learned position embeddings.

    None means any number: rotary and relative positions have no such embeddings. Raises ConfigErrors.
    """
    config = architecture(model).get_text_config()
    if _is_rotary(config):
        return None
    return table_size(meta_model(model, auto_class))


def trained_positions(model: DictConfig) -> int | None:
    """Return the number of tokens for which a rotary model was trained; None for other models.

    Raises ConfigErrors.
    """
    config = architecture(model).get_text_config()
    return getattr(config, "max_position_embeddings", None) if _is_rotary(config) else None


def table_size(model: nn.Module) -> int | None:
    """Return the number of positions in a model's position embeddings, or None if it has none."""
    tables = [module for name, module in model.named_modules() if _is_table(name, module)]
    return min((_usable(table) for table in tables), default=None)


def _is_rotary(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))


def _is_table(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and name.removesuffix(".base_layer").rpartition(".")[2] in _TABLES


def _usable(table: Any) -> int:
    # RoBERTa and similar models count positions from the padding index on. OPT and BART skip `offset` rows.
    skipped = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return int(table.num_embeddings) - int(skipped)
