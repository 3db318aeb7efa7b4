"""The base model, loaded for training, or built on the meta device from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra.config.locations import is_local, model_location
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, Problem, first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    model: DictConfig,
    auto_class: str,
    config_overrides: Mapping[str, Any] | None = None,
    *,
    quantization: Mapping[str, Any] | None = None,
    on_cpu: bool = False,
) -> PreTrainedModel:
    """The base model with its weights, frozen until an adapter is put on it.

    `config_overrides` are attributes of the model's config that the task sets: num_labels, id2label, ...;
    `quantization` is the config's group. Weights come from safetensors only: a pickle can run code while it is read.
    Raises ConfigErrors when the model isn't there or isn't what its config says.
    """
    from loraplus_hydra.models.quantization import keep_weights_as_loaded, leave_heads_alone, quantization_config

    config = _agreeing(load_config(model, config_overrides), model)
    quantized = quantization_config(quantization, auto_dtype=getattr(config, "dtype", None))
    arguments: dict[str, Any] = {}
    if quantized is not None:
        leave_heads_alone(quantized, meta_model(model, auto_class, config_overrides))
        arguments["quantization_config"] = quantized
        if on_cpu:
            arguments["device_map"] = {"": "cpu"}  # quantising would pick the accelerator
    try:
        loaded: PreTrainedModel = locate(auto_class).from_pretrained(
            model_location(model.path),
            config=config,
            dtype=model.dtype,
            attn_implementation=model.attention,
            use_safetensors=True,
            # A checkpoint with a head for other labels: it gets a new one.
            ignore_mismatched_sizes="num_labels" in (config_overrides or {}),
            **arguments,
            **hub_arguments(model),
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigErrors([_load_problem(model, error)]) from error
    if quantized is not None:
        keep_weights_as_loaded(loaded)
    loaded.requires_grad_(False)
    return loaded


def load_base(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, config_overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The base model of a run's whole config, quantised as it says and fitted to the tokenizer."""
    loaded = load_model(
        config.model,
        config.task.auto_class,
        config_overrides,
        quantization=config.quantization,
        on_cpu=bool(config.trainer.get("use_cpu")),
    )
    match_tokenizer(loaded, tokenizer)
    return loaded


def load_config(model: DictConfig, config_overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The config.json beside the model, with what the task sets in it. Raises ConfigErrors when there is none."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            model_location(model.path), **hub_arguments(model), **(config_overrides or {})
        )
    except Exception as error:  # transformers raises whatever comes of the file
        raise ConfigErrors([_load_problem(model, error)]) from error
    kernel = getattr(config, "_attn_implementation", None)
    if "/" in str(kernel) and model.attention is None and not model.trust_remote_code:
        what = f"the model's config.json asks for '{kernel}', which is code from a hub"
        raise ConfigErrors([Problem("model.attention", what, "set it, or model.trust_remote_code=true")])
    return _for_training(config)


def meta_model(
    model: DictConfig, auto_class: str, config_overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model on the meta device: every layer and shape, no weights, no memory, and for a named model no network.

    A named model's architecture is its YAML's `config`, unless its `path` is a folder here. A quantised base has the
    same layers and shapes, so it is built as if it weren't. Raises ConfigErrors.
    """
    import torch

    config = architecture(model, config_overrides)
    _refuse_encoder(config, auto_class, model)
    try:
        with torch.device("meta"):
            built: PreTrainedModel = locate(auto_class).from_config(
                config,
                dtype=getattr(config, "dtype", None) if model.dtype == "auto" else getattr(torch, model.dtype),
                attn_implementation=model.attention,
                trust_remote_code=model.trust_remote_code,
            )
            if model.add_tokens:
                built.resize_token_embeddings(config.vocab_size + len(model.add_tokens), mean_resizing=False)
    except Exception as error:  # whatever comes of a config that may be anybody's
        raise ConfigErrors([_load_problem(model, error)]) from error
    built.name_or_path = model_location(model.path)
    built.requires_grad_(False)
    return built


def architecture(model: DictConfig, config_overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The config that decides the model's layers and shapes: a named model's YAML has it, others their config.json."""
    from transformers import AutoConfig

    if not model.config or is_local(model_location(model.path)):
        return _agreeing(load_config(model, config_overrides), model)
    values = {str(key): value for key, value in model.config.items()}
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values, **(config_overrides or {}))
    except (ValueError, KeyError, TypeError) as error:
        problem = Problem("model.config", first_line(error), "give model_type and what its config.json has")
        raise ConfigErrors([problem]) from error
    return _for_training(config)


def vocabulary_problems(model: DictConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """A Problem when the tokenizer has tokens, other than `model.add_tokens`, that the embedding has no rows for."""
    rows = architecture(model).get_text_config().vocab_size
    tokens = len(tokenizer) - len(model.add_tokens)
    if tokens <= rows:
        return []
    what = f"the tokenizer has {tokens:,} tokens, but the model's embedding has {rows:,} rows"
    return [Problem("model.tokenizer", what, "name the tokenizer that the model was trained with")]


def match_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fit a loaded model to its tokenizer: the pad token's id, and rows of the embedding for new tokens.

    A classifier of a causal architecture finds the end of each text by that id. New rows are drawn around the mean of
    the old ones, from the global generator.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
        model.requires_grad_(False)
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id


def _for_training(config: PretrainedConfig) -> PretrainedConfig:
    config.use_cache = False  # of use in generation alone, and it warns beside activation checkpointing
    return config


def _refuse_encoder(config: PretrainedConfig, auto_class: str, model: DictConfig) -> None:
    """transformers loads an encoder as a causal model too, and warns where it should stop: each token sees the next."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False
    if auto_class.endswith("ForCausalLM") and is_encoder:
        what = f"{model.path} is an encoder ({config.model_type}), which sees the text that it should go on with"
        raise ConfigErrors([Problem("model.path", what, "use task=classification, or a causal model")])


def _agreeing(config: PretrainedConfig, model: DictConfig) -> PretrainedConfig:
    """`config`, or ConfigErrors when a checkpoint isn't of the architecture that a named model's YAML states."""
    problems = [
        Problem(
            f"model.config.{name}",
            f"is {value}, but the model at {model.path} has {getattr(config, str(name), None)}",
            "a model of another size or kind goes by model=hub model.path=...",
        )
        for name, value in model.config.items()
        if getattr(config, str(name), None) != value
    ]
    if problems:
        raise ConfigErrors(problems)
    return config


def _load_problem(model: DictConfig, error: Exception) -> Problem:
    if problem := no_folder("model.path", model.path):
        return problem
    text = first_line(error)
    if "trust_remote_code" in str(error) and not model.trust_remote_code:
        what = f"{model.path} brings Python of its own, which isn't run"
        return Problem("model.path", what, "read it, then set model.trust_remote_code=true")
    if "safetensors" in str(error):
        return Problem(
            "model.path", text, "only safetensors are read, since a pickle can run code: convert the weights"
        )
    return Problem("model.path", f"{model.path} can't be loaded: {text}", where_models_are(model.path))


def no_folder(key: str, path: str) -> Problem | None:
    """A Problem when `path`, set by `key`, is meant as a folder here and there is none."""
    location = model_location(path)
    if not is_local(location) or Path(location).is_dir():
        return None
    where = "" if Path(location).is_absolute() else f" (looked for in {Path.cwd()})"
    return Problem(key, f"there is no folder {location}{where}", where_models_are(path))


def where_models_are(path: str) -> str:
    """What to do about a model or tokenizer that isn't at `path`."""
    if is_local(model_location(path)):
        return "name a folder that holds a model with its config.json and tokenizer"
    return "name a folder, or a model on the hub: that needs the network once, and `hf auth login` where it is gated"


def hub_arguments(model: DictConfig) -> dict[str, Any]:
    """What `from_pretrained` is told besides the path."""
    arguments: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision is not None:
        arguments["revision"] = model.revision
    if is_local(model_location(model.path)) or _hub_has_no_address():
        arguments["local_files_only"] = True
    return arguments


def _hub_has_no_address() -> bool:
    """Whether the network is plainly absent: each file would be asked for six times, over half a minute, in vain.

    What was fetched before is then read as it is. Behind a proxy it is the proxy that knows addresses.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode() or getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False
