"""The base model and its tokenizer, loaded for training, or built on the meta device from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraplus_hydra.build import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.paths import is_local, model_location

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    model: DictConfig, auto_class: str, config_overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The base model with its weights, frozen until an adapter is put on it.

    `config_overrides` are attributes of the model's config that the task sets: num_labels, id2label, ...

    Weights come from safetensors only: a pickle can run code while it is read.
    """
    model_class = locate(auto_class)
    loaded: PreTrainedModel = model_class.from_pretrained(
        model_location(model.path),
        config=load_config(model, config_overrides),
        dtype=model.dtype,
        attn_implementation=model.attention,
        use_safetensors=True,
        **_hub_arguments(model),
    )
    loaded.requires_grad_(False)
    # Generation settings for sampling are no business of training, and warn at each greedy answer.
    return loaded


def load_config(model: DictConfig, config_overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The model's own config.json, with what the task sets in it."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(
        model_location(model.path), **_hub_arguments(model), **(config_overrides or {})
    )
    config.use_cache = False  # of use in generation alone, and it warns beside gradient checkpointing
    return config


def load_tokenizer(model: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token: the end-of-text token stands in where there is none."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model_location(model.tokenizer or model.path), **_hub_arguments(model)
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model.tokenizer: the tokenizer of {model.path} has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def meta_model(
    model: DictConfig, auto_class: str, config_overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model on the meta device: every layer and shape, no weights, no memory."""
    import torch

    config = load_config(model, config_overrides)
    with torch.device("meta"):
        built: PreTrainedModel = locate(auto_class).from_config(
            config,
            dtype=None if model.dtype == "auto" else getattr(torch, model.dtype),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
        )
    built.requires_grad_(False)
    return built


def _hub_arguments(model: DictConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision is not None:
        arguments["revision"] = model.revision
    if is_local(model_location(model.path)):
        arguments["local_files_only"] = True
    return arguments
