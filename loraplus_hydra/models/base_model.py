"""The base model, loaded with weights, or built from its config on the meta device."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import torch
from omegaconf import DictConfig
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from loraplus_hydra.config.locations import is_local, model_location
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, refuse
from loraplus_hydra.io.quiet_libraries import quiet_new_head
from loraplus_hydra.models.quantization import disable_cpu_repacking, quantization_config, skip_heads

REDRAWN = ("classifier", "score")  # a classifier's layers that `task.new_head` replaces; PEFT trains these two
# Output layers of other tasks, which a classifier leaves out
_OTHER_HEADS = ("lm_head", "cls", "embed_out")


def load_model(
    model: DictConfig,
    auto_class: str,
    config_overrides: Mapping[str, Any] | None = None,
    *,
    quantization: Mapping[str, Any] | None = None,
    on_cpu: bool = False,
) -> PreTrainedModel:
    """Load the base model with its weights, frozen, from safetensors only.

    `config_overrides` are attributes of the model's config that the task sets (num_labels, id2label, ...).
    `quantization` is the config's group. Raises ConfigErrors if the model can't be loaded, or if its config differs
    from the YAML of the option.
    """
    config = load_config(model, config_overrides)
    _refuse_other_architecture(config, model)
    arguments = hub_arguments(model, model.path)
    quantized = quantization_config(quantization, auto_dtype=getattr(config, "dtype", None))
    if quantized is not None:
        skip_heads(quantized, meta_model(model, auto_class, config_overrides))
        arguments["quantization_config"] = quantized
        if on_cpu:
            arguments["device_map"] = {"": "cpu"}  # transformers would quantise on the accelerator
    try:
        with quiet_new_head((*REDRAWN, *_OTHER_HEADS)):
            loaded: PreTrainedModel = locate(auto_class).from_pretrained(
                model_location(model.path),
                config=config,
                dtype=model.dtype,
                attn_implementation=model.attention,
                use_safetensors=True,  # reading a pickle can run code
                # If the checkpoint's head is for other labels, a new head replaces it.
                ignore_mismatched_sizes="num_labels" in (config_overrides or {}),
                **arguments,
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigErrors([_load_problem(model, error)]) from error
    if quantized is not None:
        disable_cpu_repacking(loaded)
    loaded.requires_grad_(False)
    return loaded


def load_base(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, config_overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Load the base model of a run's config, and match it to the tokenizer.

    The model is quantised if the config has a quantisation.
    """
    loaded = load_model(
        config.model,
        config.task.auto_class,
        config_overrides,
        quantization=config.quantization,
        on_cpu=bool(config.trainer.get("use_cpu")),
    )
    if config.task.get("new_head"):
        draw_new_head(loaded)
    match_tokenizer(loaded, tokenizer)
    return loaded


def draw_new_head(model: PreTrainedModel) -> None:
    """Initialise a classifier's head again, with the global random generator."""
    for name, module in model.named_children():
        if name in REDRAWN:
            for part in module.modules():
                part._is_hf_initialized = False  # without this flag transformers would leave loaded weights unchanged
                for tensor in part.parameters(recurse=False):
                    tensor._is_hf_initialized = False  # type: ignore[attr-defined]
            module.apply(model._init_weights)


def load_config(model: DictConfig, config_overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Load the model's config.json and set the task's overrides in it. Raises ConfigErrors."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            model_location(model.path), **hub_arguments(model, model.path), **(config_overrides or {})
        )
    except Exception as error:  # transformers raises many types for a broken file
        raise ConfigErrors([_load_problem(model, error)]) from error
    kernel = getattr(config, "_attn_implementation", None)
    if "/" in str(kernel) and model.attention is None and not model.trust_remote_code:
        what = f"the model's config.json asks for '{kernel}', which is code from a hub"
        raise ConfigErrors([Problem("model.attention", what, "set model.attention, or model.trust_remote_code=true")])
    return _without_cache(config)


def meta_model(
    model: DictConfig, auto_class: str, config_overrides: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Build the model on the meta device: every layer and shape, without weights and memory.

    If the model's option has the architecture, no network is needed. A quantised base is built without quantisation,
    because layers and shapes are the same. Raises ConfigErrors.
    """
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
    except Exception as error:  # an untrusted config can cause any error
        raise ConfigErrors([_load_problem(model, error)]) from error
    built.name_or_path = model_location(model.path)
    built.requires_grad_(False)
    return built


def architecture(model: DictConfig, config_overrides: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Return the config that decides the model's layers and shapes.

    If `model.path` is not a local folder and the option's YAML has the architecture, the YAML is used. Otherwise the
    model's config.json is used. Raises ConfigErrors.
    """
    if not model.config or is_local(model_location(model.path)):
        config = load_config(model, config_overrides)
        _refuse_other_architecture(config, model)
        return config
    values = {str(key): value for key, value in model.config.items()}
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **{**values, **(config_overrides or {})})
    except (ValueError, KeyError, TypeError) as error:
        problem = Problem("model.config", first_line(error), "give model_type and the keys of its config.json")
        raise ConfigErrors([problem]) from error
    return _without_cache(config)


def vocabulary_problems(model: DictConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Return a Problem if the tokenizer has more tokens than the embedding has rows.

    Tokens of `model.add_tokens` don't count, because they get new rows.
    """
    rows = architecture(model).get_text_config().vocab_size
    tokens = len(tokenizer) - len(model.add_tokens)
    if tokens <= rows:
        return []
    what = f"the tokenizer has {tokens:,} tokens, but the model's embedding has {rows:,} rows"
    return [Problem("model.tokenizer", what, "use the tokenizer that the model was trained with")]


def match_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer's pad and end token in a loaded model, and add rows for new tokens.

    New rows are drawn around the mean of the old rows, with the global random generator.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
        model.requires_grad_(False)
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id  # a causal classifier uses it to find the end of each text
    generation, end = getattr(model, "generation_config", None), tokenizer.eos_token_id
    if generation is not None and end is not None:
        # Training writes this token after each answer (`task.args.eos_token`), so an answer must end there, too. The
        # Trainer sets it in the same way, but only in its own model.
        known = generation.eos_token_id
        ends = known if isinstance(known, list) else [] if known is None else [known]
        if end not in ends:
            generation.eos_token_id = [end, *ends]


def missing_folder_problem(key: str, path: str) -> Problem | None:
    """Return a Problem at `key` if `path` is a local folder that doesn't exist."""
    location = model_location(path)
    if not is_local(location) or os.path.isdir(location):  # noqa: PTH112 - False for names that are too long
        return None
    where = "" if Path(location).is_absolute() else f" (searched for in {Path.cwd()})"
    return Problem(key, f"there is no folder {location}{where}", location_advice(path))


def location_advice(path: str) -> str:
    """Return advice for a model or tokenizer that isn't found at `path`."""
    if is_local(model_location(path)):
        return "give a folder that contains a model with its config.json and tokenizer"
    return "give a folder, or a model on the hub (needs the network once, and `hf auth login` if it is gated)"


def hub_arguments(model: DictConfig, path: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` about the hub and remote code.

    `path` is what is loaded: the base model's, or that of a tokenizer from elsewhere, where the base's revision means
    nothing.
    """
    arguments: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision is not None and path == model.path:
        arguments["revision"] = model.revision
    if is_local(model_location(path)) or _hub_has_no_address():
        arguments["local_files_only"] = True
    return arguments


def _hub_has_no_address() -> bool:
    """Return True if the hub's host name can't be resolved. Then only cached files can be used."""
    # Without this check huggingface_hub would try each file six times, which takes over half a minute. With a proxy,
    # the proxy resolves names.
    if huggingface_hub.is_offline_mode() or urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _without_cache(config: PretrainedConfig) -> PretrainedConfig:
    config.use_cache = False  # only generation uses the cache, and it causes a warning with activation checkpointing
    return config


def _refuse_encoder(config: PretrainedConfig, auto_class: str, model: DictConfig) -> None:
    # transformers only warns when it loads an encoder as a causal model. Each token would see the next token.
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False
    if auto_class.endswith("ForCausalLM") and is_encoder:
        what = f"{model.path} is an encoder ({config.model_type}), whose tokens see the text that should be predicted"
        raise ConfigErrors([Problem("model.path", what, "use task=classification, or a causal model")])


def _refuse_other_architecture(config: PretrainedConfig, model: DictConfig) -> None:
    """Raise ConfigErrors if a checkpoint's config differs from the architecture in the option's YAML."""
    fix = "for a model of another size or kind use model=hub model.path=..."
    given = {str(name): (value, getattr(config, str(name), None)) for name, value in model.config.items()}
    refuse(
        Problem(f"model.config.{name}", f"is {value}, but it is {own} in the model at {model.path}", fix)
        for name, (value, own) in given.items()
        if own != value
    )


def _load_problem(model: DictConfig, error: Exception) -> Problem:
    if problem := missing_folder_problem("model.path", model.path):
        return problem
    text = first_line(error)
    if "trust_remote_code" in str(error) and not model.trust_remote_code:
        what = f"{model.path} contains Python code, which isn't run"
        return Problem("model.path", what, "read the code, then set model.trust_remote_code=true")
    if "safetensors" in str(error):
        return Problem(
            "model.path", text, "only safetensors are read, because a pickle can run code: convert the weights"
        )
    return Problem("model.path", f"{model.path} can't be loaded: {text}", location_advice(model.path))
