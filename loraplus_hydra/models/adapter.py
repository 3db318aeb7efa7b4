"""PEFT configs from the `adapter` group, and models with an adapter."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from loraplus_hydra.config.targets import instantiate, locate
from loraplus_hydra.errors import ConfigErrors, Problem, refuse
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.loraplus.peft_layers import A_ZERO, ADAPTER_NAME, LOFTQ, TRAINED, note_initialisation
from loraplus_hydra.models import adalora
from loraplus_hydra.models.adapter_files import CONFIG, KEY, StoredAdapter, attach, first_misfit, stored_adapter
from loraplus_hydra.models.initialisation import (
    changes_base,
    copy_factors,
    initialise_a_zero,
    refuse_shared_weights,
)
from loraplus_hydra.models.named_layers import unmatched_problems
from loraplus_hydra.models.patterns import refuse_slow_patterns
from loraplus_hydra.models.token_rows import FIELD, row_differences

ALL_LINEAR = "all-linear"
WITH_EMBEDDINGS = "all-linear+embeddings"  # this program's own value: PEFT's all-linear, and the input embedding
OWN_KEYS = ("path",)  # keys of `adapter` that are not fields of a PEFT config
_WHOLE_LAYERS = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "word_embeddings.weight")
# Fields of a PEFT config about an adapter's start or storage. They make no difference to a trained adapter.
_NOT_COMPARED = frozenset(
    {
        *("init_lora_weights", "target_modules", "task_type", "inference_mode", "revision", "auto_mapping"),
        *("tinit", "tfinal", "total_step", "orth_reg_weight", "modules_to_save"),
        *("base_model_name_or_path", "peft_version"),
        FIELD,  # `row_differences` compares it, because new tokens add rows
    }
)


class Schedule(Protocol):
    """The functions that a PEFT method with its own schedule needs, as a module."""

    def config_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments of the PEFT config class that don't depend on the run's steps."""

    def problems(self, adapter: Mapping[str, Any], trainer: Mapping[str, Any]) -> list[Problem]:
        """Check the schedule that an `adapter` group sets for the steps of a `trainer` group."""

    def continue_problems(self, config: PeftConfig) -> list[Problem]:
        """Return a Problem if a stored adapter with this config can't be trained further."""

    def finish_meta_model(self, model: nn.Module) -> None:
        """Correct tensors that PEFT makes differently on the meta device."""

    def callbacks(self, model: PeftModel, adapter: Mapping[str, Any]) -> list[TrainerCallback]:
        """Return the callbacks that a Trainer of `model` needs."""


SCHEDULES: dict[type[PeftConfig], Schedule] = {AdaLoraConfig: adalora}


def schedule_of(config_class: type[PeftConfig]) -> Schedule | None:
    """Return the schedule of a PEFT config class, or None for a method without one."""
    return next((schedule for known, schedule in SCHEDULES.items() if issubclass(config_class, known)), None)


def adapter_config(adapter: DictConfig | Mapping[str, Any], task_type: str | None) -> PeftConfig:
    """Build the PEFT config of `adapter`. `task_type` is used if `adapter` has none."""
    return instantiate({"task_type": task_type, **peft_arguments(adapter)})


def peft_arguments(adapter: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Translate the `adapter` group into a PEFT config class (`_target_`) and its keyword arguments."""
    arguments = {str(key): value for key, value in adapter.items() if key not in OWN_KEYS}
    if arguments.get("init_lora_weights") in (A_ZERO, LOFTQ):
        # True, because this program exchanges the factors after PEFT's own initialisation. With false PEFT would also
        # leave factors of embeddings, biases of lora_B and DoRA's magnitudes random, so the adapted model would not
        # start as the base model.
        arguments["init_lora_weights"] = True
    schedule = schedule_of(locate(arguments["_target_"]))
    return schedule.config_arguments(arguments) if schedule else arguments


def add_adapter(
    model: PreTrainedModel,
    adapter: DictConfig | Mapping[str, Any],
    task_type: str | None,
    *,
    new_tokens: Sequence[int] = (),
    revision: str | None = None,
    on_meta: bool = False,
) -> PeftModel:
    """Add the adapter to `model`. Only the adapter's tensors have `requires_grad`.

    `new_tokens` are token ids whose rows of the embedding are also trained. `revision` is the base model's revision,
    stored with the adapter. With `on_meta`, the model is on the meta device, and so is the adapter. Raises UserError.
    """
    config = adapter_config(adapter, task_type) if adapter.get("_target_") else None
    given, layers = copy.deepcopy(config), possible_targets(model)  # PEFT changes both
    if config is not None:
        _name_target_layers(config, model)
    if adapter.get("path"):
        continued = continue_adapter(model, adapter["path"], config, new_tokens=new_tokens, on_meta=on_meta)
        _refuse_tied_factors(continued)
        note_initialisation(continued, TRAINED)
        return continued
    if config is None or given is None:
        what = "is not set, and adapter._target_ is not set either"
        raise ConfigErrors([Problem(KEY, what, "set it to a stored adapter, or use adapter=lora")])
    _train_new_tokens(config, model, new_tokens)
    _refuse_olora_on_conv1d(config, model)
    adapted = _new_adapter(model, config, revision=revision, on_meta=on_meta)
    refuse(unmatched_problems(given, adapted, layers))
    _refuse_tied_factors(adapted)
    if adapter.get("init_lora_weights") == A_ZERO:
        initialise_a_zero(adapted)
    if adapter.get("init_lora_weights") == LOFTQ:
        # The caller computes the factors (`initialise_loftq`), which needs the base without quantisation
        note_initialisation(adapted, LOFTQ)
    if changes_base(getattr(config, "init_lora_weights", None)):
        refuse_shared_weights(adapted)
        if not on_meta:
            # `save_adapter` needs these copies to convert the adapter to the original base.
            adapted.initial_factors = copy_factors(adapted)
    return adapted


def continue_adapter(
    model: PreTrainedModel,
    path: str,
    configured: PeftConfig | None,
    *,
    new_tokens: Sequence[int] = (),
    on_meta: bool = False,
) -> PeftModel:
    """Add the stored adapter at `path` to `model` for further training.

    `configured` is the PEFT config of the run's own keys. With None, the stored adapter's config is used. On the meta
    device only the names and shapes of the stored tensors are compared with the model. Raises ConfigErrors if the
    adapter can't be trained further, was trained on another base, or differs from `configured`.
    """
    stored = stored_adapter(path)
    problems = [*_continue_problems(stored, new_tokens), *_base_problems(stored, model)]
    problems += _differences(stored.config, configured)
    if configured is not None and (getattr(stored.config, FIELD, None) or getattr(configured, FIELD, None)):
        embedding = _name_of(model, model.get_input_embeddings())
        problems += row_differences(stored.config, configured, embedding, new_tokens)
    refuse(problems)
    if not on_meta:
        return attach(model, stored, trainable=True)
    stored.config.inference_mode = False
    if hasattr(configured, FIELD):
        setattr(configured, FIELD, getattr(stored.config, FIELD, None))  # also has the rows of new tokens
    adapted = _new_adapter(model, configured or stored.config, on_meta=True)
    if misfit := first_misfit(adapted, stored):
        fix = "adapter=existing uses the stored adapter's own settings"
        if any(name.endswith(_WHOLE_LAYERS) for name in stored.shapes()):
            # PEFT stores the whole embedding where `resize_token_embeddings` was called before.
            fix = "it brings an embedding with new tokens: merge it with PEFT, and start from the merged model"
        raise ConfigErrors([Problem(KEY, misfit, fix)])
    return adapted


def possible_targets(model: nn.Module) -> list[str]:
    """Return the names of layers that LoRA can adapt, the most frequent first.

    The names are last parts of full names, such as q_proj and v_proj.
    """
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    names = Counter(name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds))
    return [name for name, _ in names.most_common()]


def _new_adapter(model: PreTrainedModel, config: PeftConfig, *, on_meta: bool, revision: str | None = None) -> Any:
    refuse_slow_patterns(config, model)
    # PEFT's low memory use makes new parameters, so modules that should share one no longer do. Without it, a large
    # model's plan takes twice as long.
    shares = any(getattr(config, field, None) for field in ("ensure_weight_tying", "layer_replication"))
    # An initialisation can compute with the base's weights, so it needs the adapter on the same device.
    device = torch.device("meta") if on_meta and shares else nullcontext()
    with quiet_peft(), device:
        adapted = get_peft_model(model, config, revision=revision, low_cpu_mem_usage=on_meta and not shares)
    if on_meta and (schedule := schedule_of(type(config))):
        schedule.finish_meta_model(adapted)
    return adapted


def _name_target_layers(config: PeftConfig, model: PreTrainedModel) -> None:
    """Replace `all-linear+embeddings` with the names of this model's layers."""
    if getattr(config, "target_modules", None) != WITH_EMBEDDINGS:
        return
    config.target_modules = ALL_LINEAR
    _maybe_include_all_linear_layers(config, model)
    config.target_modules = sorted({*config.target_modules, _name_of(model, model.get_input_embeddings())})


def _train_new_tokens(config: PeftConfig, model: PreTrainedModel, new_tokens: Sequence[int]) -> None:
    """Make the rows of new tokens trainable, also in an output layer that isn't tied to the embedding."""
    if not new_tokens:
        return
    if not hasattr(config, "trainable_token_indices"):
        what = f"{type(config).__name__} can't train the rows of new tokens"
        raise ConfigErrors([Problem("model.add_tokens", what, "use a LoRA adapter (adapter=lora), or []")])
    if _name_of(model, model.get_input_embeddings()) in (getattr(config, "target_modules", None) or ()):
        what = "rows of new tokens can't train if the adapter adapts the embedding"
        raise ConfigErrors([Problem("model.add_tokens", what, "use adapter=lora, or []")])
    given = config.trainable_token_indices or {}
    embedding, output = _name_of(model, model.get_input_embeddings()), model.get_output_embeddings()
    # PEFT trains the rows of a list in the embedding only
    rows = dict(given) if isinstance(given, Mapping) else {_last_part(embedding): given}
    _add_rows(rows, embedding, new_tokens)
    if output is not None:
        is_tied = model.config.get_text_config().tie_word_embeddings
        _add_rows(rows, _name_of(model, output), new_tokens, only_named=is_tied)
    config.trainable_token_indices = rows


def _add_rows(rows: dict[str, Sequence[int]], layer: str, tokens: Sequence[int], *, only_named: bool = False) -> None:
    """Add tokens to the trained rows of a layer, at the name by which `rows` has it.

    With `only_named`, a layer that `rows` doesn't have is left out.
    """
    named = [key for key in rows if layer.endswith(key)]  # PEFT matches the ends of names, too
    for key in named or ([] if only_named else [_last_part(layer)]):
        rows[key] = list(dict.fromkeys([*rows.get(key, ()), *tokens]))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _refuse_olora_on_conv1d(config: PeftConfig, model: PreTrainedModel) -> None:
    # PEFT 0.21.2 decomposes every weight like a Linear's, but Conv1D stores the transposed weight.
    initialisation = str(getattr(config, "init_lora_weights", None)).lower()
    if initialisation == "olora" and any(isinstance(module, Conv1D) for module in model.modules()):
        what = f"PEFT's olora doesn't support the Conv1D layers of {type(model).__name__}"
        raise ConfigErrors([Problem("adapter.init_lora_weights", what, "use pissa")])


def _refuse_tied_factors(adapted: PeftModel) -> None:
    # PEFT 0.21.2 makes two parameters that share memory. The optimizer would change it twice in each step, at the rates
    # of both. A cast or a move to a GPU gives each parameter its own memory, so they would silently be tied no more.
    if tied := getattr(adapted.peft_config[ADAPTER_NAME], "target_modules_to_tie", None):
        what = f"LoRA of the embedding and of {', '.join(sorted(tied))} would be one tensor with two rates"
        fix = "set it to false; with modules_to_save it can be true"
        raise ConfigErrors([Problem("adapter.ensure_weight_tying", what, fix)])


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


def _continue_problems(stored: StoredAdapter, new_tokens: Sequence[int]) -> list[Problem]:
    config = stored.config
    if new_tokens and not getattr(config, FIELD, None):
        return [Problem("model.add_tokens", "the adapter at adapter.path has no rows for new tokens", "use []")]
    if changes_base(getattr(config, "init_lora_weights", None)):
        what = f"the adapter is stored as {config.init_lora_weights}, which has changed the base"
        return [Problem(KEY, what, "store it as plain LoRA (PEFT's path_initial_model_for_weight_conversion)")]
    schedule = schedule_of(type(config))
    return schedule.continue_problems(config) if schedule else []


def _base_problems(stored: StoredAdapter, model: PreTrainedModel) -> list[Problem]:
    then, now = stored.config.base_model_name_or_path, model.name_or_path
    # Only the last part of the path is compared, because the folder may have been moved.
    if not then or not now or Path(then).name == Path(now).name:
        return []
    fix = f"set model.path={then}; if {now} is the same model, write its path into {stored.folder / CONFIG}"
    return [Problem(KEY, f"the adapter was trained on {then}, but model.path is {now}", fix)]


def _differences(stored: PeftConfig, configured: PeftConfig | None) -> list[Problem]:
    if configured is None:
        return []
    then, now = _comparable_fields(stored), _comparable_fields(configured)
    return [
        Problem(f"adapter.{name}", f"is {value}, but {then.get(name)} in the adapter at {KEY}", "adapter=existing")
        for name, value in now.items()
        if value != then.get(name)
    ]


def _comparable_fields(config: PeftConfig) -> dict[str, Any]:
    """Return the config's fields as JSON values, with None for every empty value."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return {name: value or None for name, value in json.loads(json.dumps(plain, default=str)).items()}
