"""The adapter: config -> PEFT config -> PeftModel, and what of the model an adapter could sit on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraplus_hydra.config.targets import instantiate
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.loraplus.starts import A_ZERO, TRAINED, note_start
from loraplus_hydra.models.initialisation import changes_base, factors, start_with_a_zero

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
WITH_EMBEDDINGS = "all-linear+embeddings"  # our word: PEFT's all-linear, and the input embedding
OWN_KEYS = ("path",)  # keys of `adapter` that are no fields of a PEFT config


def adapter_config(adapter: DictConfig | Mapping[str, Any], task_type: str | None) -> PeftConfig:
    """The PEFT config of `adapter`; `task_type` is the task's unless the adapter names one."""
    arguments = peft_arguments(adapter)
    arguments.setdefault("task_type", task_type)
    config: PeftConfig = instantiate(arguments)
    return config


def peft_arguments(adapter: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """`adapter` with its `_target_` as PEFT's classes take it: without our keys, and with PEFT's words for ours."""
    from loraplus_hydra.models.adalora import placeholder_arguments

    arguments = {str(key): value for key, value in adapter.items() if key not in OWN_KEYS}
    if arguments.get("init_lora_weights") == A_ZERO:
        # `add_adapter` turns PEFT's start round. Without one (false) PEFT would leave embeddings' factors, biases of
        # lora_B and DoRA's magnitudes as random as they come, and the adapted model wouldn't start as the base.
        arguments["init_lora_weights"] = True
    if str(arguments.get("_target_")).endswith(".AdaLoraConfig"):
        arguments = placeholder_arguments(arguments)
    return arguments


def add_adapter(
    model: PreTrainedModel,
    adapter: DictConfig | Mapping[str, Any],
    task_type: str | None,
    *,
    new_tokens: Sequence[int] = (),
    revision: str | None = None,
    on_meta: bool = False,
) -> PeftModel:
    """`model` with the adapter in place; only what the adapter trains has `requires_grad`.

    `new_tokens` are ids whose rows train too; `revision` is the base model's, stored with the adapter. With `on_meta`
    the model is on the meta device and stays there. Raises UserError.
    """
    from peft import get_peft_model

    from loraplus_hydra.models.adalora import freeze_rank_numbers
    from loraplus_hydra.models.adapter_files import continue_adapter

    if adapter.get("path"):
        wanted = adapter_config(adapter, task_type) if adapter.get("_target_") else None
        if wanted is not None:
            _target_embeddings(wanted, model)
        continued = continue_adapter(model, adapter["path"], wanted, new_tokens=new_tokens, on_meta=on_meta)
        note_start(continued, TRAINED)
        return continued
    config = adapter_config(adapter, task_type)
    _target_embeddings(config, model)
    _train_new_tokens(config, model, new_tokens)
    _refuse_olora_on_conv1d(config, model)
    with quiet_peft():
        peft_model: Any = get_peft_model(model, config, revision=revision, low_cpu_mem_usage=on_meta)
    if on_meta:
        freeze_rank_numbers(peft_model)
    if adapter.get("init_lora_weights") == A_ZERO:
        start_with_a_zero(peft_model)
    if not on_meta and changes_base(getattr(config, "init_lora_weights", None)):
        # Kept until the adapter is saved, see `initialisation.on_original_base`.
        peft_model.initial_factors = factors(peft_model)
    return peft_model


def possible_targets(model: nn.Module) -> list[str]:
    """Last parts of the names of layers that LoRA can sit on, the most frequent first: q_proj, v_proj, ..."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    names = Counter(name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds))
    return [name for name, _ in names.most_common()]


def _target_embeddings(config: PeftConfig, model: PreTrainedModel) -> None:
    """Write `all-linear+embeddings` out as the names of this model's layers."""
    if getattr(config, "target_modules", None) != WITH_EMBEDDINGS:
        return
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    config.target_modules = ALL_LINEAR
    _maybe_include_all_linear_layers(config, model)
    config.target_modules = sorted({*config.target_modules, _name_of(model, model.get_input_embeddings())})


def _train_new_tokens(config: PeftConfig, model: PreTrainedModel, new_tokens: Sequence[int]) -> None:
    """Let the rows of new tokens train, in the output layer too where it has rows of its own."""
    if not new_tokens:
        return
    if not hasattr(config, "trainable_token_indices"):
        what = f"{type(config).__name__} can't train the rows of new tokens"
        raise ConfigErrors(
            [Problem("model.add_tokens", what, "use adapter=lora or one of its kind, or leave it empty")]
        )
    if _name_of(model, model.get_input_embeddings()) in (getattr(config, "target_modules", None) or ()):
        what = "rows of new tokens can't train where the adapter sits on the embedding itself"
        raise ConfigErrors([Problem("model.add_tokens", what, "use adapter=lora, or leave it empty")])
    layers = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and not model.config.get_text_config().tie_word_embeddings:
        layers.append(output)
    names = [_name_of(model, layer).rpartition(".")[2] for layer in layers]
    config.trainable_token_indices = {name: list(new_tokens) for name in names}


def _refuse_olora_on_conv1d(config: PeftConfig, model: PreTrainedModel) -> None:
    """PEFT's OLoRA takes every weight for a Linear's, and breaks those that lie the other way round (0.21.2)."""
    from transformers.pytorch_utils import Conv1D

    start = str(getattr(config, "init_lora_weights", None)).lower()
    if start == "olora" and any(isinstance(module, Conv1D) for module in model.modules()):
        what = f"PEFT's olora doesn't know the Conv1D layers of {type(model).__name__}"
        raise ConfigErrors([Problem("adapter.init_lora_weights", what, "use pissa")])


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)
