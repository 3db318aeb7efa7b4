"""Build the PEFT config of the `adapter` group and add the adapter to a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from loraplus_hydra.config.targets import instantiate, locate
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.loraplus.peft_layers import A_ZERO, TRAINED, note_initialisation
from loraplus_hydra.models import adalora
from loraplus_hydra.models.adapter_files import CONFIG, KEY, StoredAdapter, attach, first_misfit, stored_adapter
from loraplus_hydra.models.initialisation import changes_base, copy_factors, initialise_a_zero
from loraplus_hydra.models.patterns import refuse_slow_patterns

ALL_LINEAR = "all-linear"
WITH_EMBEDDINGS = "all-linear+embeddings"  # not PEFT's: its all-linear and the input embedding
OWN_KEYS = ("path",)  # keys of `adapter` that are no fields of a PEFT config
# Fields of a PEFT config that say how an adapter started or was stored, not what it is.
_NOT_COMPARED = frozenset(
    {
        *("init_lora_weights", "target_modules", "task_type", "inference_mode", "revision", "auto_mapping"),
        *("tinit", "tfinal", "total_step", "orth_reg_weight", "trainable_token_indices", "modules_to_save"),
        *("base_model_name_or_path", "peft_version"),
    }
)


class Schedule(Protocol):
    """Functions of a module for a PEFT method that follows a schedule of its own."""

    def config_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the PEFT config class before the run's steps are known."""

    def problems(self, adapter: Mapping[str, Any], trainer: Mapping[str, Any]) -> list[Problem]:
        """Check the schedule that an `adapter` group sets for the steps of a `trainer` group."""

    def continue_problems(self, config: PeftConfig) -> list[Problem]:
        """Return a Problem if a stored adapter with this config can't be trained further."""

    def finish_meta_model(self, model: nn.Module) -> None:
        """Correct what PEFT makes differently on the meta device."""

    def callbacks(self, model: PeftModel, adapter: Mapping[str, Any]) -> list[TrainerCallback]:
        """Return the callbacks that a Trainer of `model` needs for its `adapter` group."""


SCHEDULES: dict[type[PeftConfig], Schedule] = {AdaLoraConfig: adalora}


def schedule_of(config_class: type[PeftConfig]) -> Schedule | None:
    """Return the schedule of a PEFT config class, or None for a method without one."""
    return next((schedule for known, schedule in SCHEDULES.items() if issubclass(config_class, known)), None)


def adapter_config(adapter: DictConfig | Mapping[str, Any], task_type: str | None) -> PeftConfig:
    """Build the PEFT config of `adapter`; `task_type` is used unless the adapter names one."""
    return instantiate({"task_type": task_type, **peft_arguments(adapter)})


def peft_arguments(adapter: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Translate the `adapter` group into `_target_` and keyword arguments of its PEFT config class."""
    arguments = {str(key): value for key, value in adapter.items() if key not in OWN_KEYS}
    if arguments.get("init_lora_weights") == A_ZERO:
        # `add_adapter` reverses PEFT's own initialisation. With false PEFT would also leave factors of embeddings,
        # biases of lora_B and DoRA's magnitudes random, so the adapted model would not start as the base.
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
    """Add the adapter to `model`; only the adapter's tensors have `requires_grad`.

    `new_tokens` are token ids whose rows of the embedding train too. `revision` is the base model's, stored with the
    adapter. With `on_meta` the model is on the meta device and stays there. Raises UserError.
    """
    config = adapter_config(adapter, task_type) if adapter.get("_target_") else None
    if config is not None:
        _name_target_layers(config, model)
    if adapter.get("path"):
        continued = continue_adapter(model, adapter["path"], config, new_tokens=new_tokens, on_meta=on_meta)
        note_initialisation(continued, TRAINED)
        return continued
    if config is None:
        what = "is not set, nor is adapter._target_"
        raise ConfigErrors([Problem(KEY, what, "name a stored adapter, or use adapter=lora")])
    _train_new_tokens(config, model, new_tokens)
    _refuse_olora_on_conv1d(config, model)
    adapted = _new_adapter(model, config, revision=revision, on_meta=on_meta)
    if adapter.get("init_lora_weights") == A_ZERO:
        initialise_a_zero(adapted)
    if not on_meta and changes_base(getattr(config, "init_lora_weights", None)):
        # `save_adapter` needs them to convert the adapter to the original base.
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
    """Add the stored adapter at `path` to `model`, to train it further.

    `configured` is the PEFT config of the run's own keys, or None to take the adapter's. On the meta device only names
    and shapes of the stored tensors are compared with the model's. Raises ConfigErrors if the adapter can't be trained
    further, belongs to another base, or differs from `configured`.
    """
    stored = stored_adapter(path)
    problems = [
        *_continue_problems(stored, new_tokens),
        *_base_problems(stored, model),
        *_differences(stored.config, configured),
    ]
    if problems:
        raise ConfigErrors(problems)
    if not on_meta:
        return attach(model, stored, trainable=True)
    stored.config.inference_mode = False
    adapted = _new_adapter(model, configured or stored.config, on_meta=True)
    if misfit := first_misfit(adapted, stored):
        raise ConfigErrors([Problem(KEY, misfit, "adapter=existing takes the adapter's own settings")])
    return adapted


def possible_targets(model: nn.Module) -> list[str]:
    """Return the names of layers that LoRA can adapt, the most frequent first.

    They are last parts of full names, such as q_proj and v_proj.
    """
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    names = Counter(name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds))
    return [name for name, _ in names.most_common()]


def _new_adapter(model: PreTrainedModel, config: PeftConfig, *, on_meta: bool, revision: str | None = None) -> Any:
    refuse_slow_patterns(config, model)
    with quiet_peft():
        adapted = get_peft_model(model, config, revision=revision, low_cpu_mem_usage=on_meta)
    if on_meta and (schedule := schedule_of(type(config))):
        schedule.finish_meta_model(adapted)
    return adapted


def _name_target_layers(config: PeftConfig, model: PreTrainedModel) -> None:
    """Replace `all-linear+embeddings` by the names of this model's layers."""
    if getattr(config, "target_modules", None) != WITH_EMBEDDINGS:
        return
    config.target_modules = ALL_LINEAR
    _maybe_include_all_linear_layers(config, model)
    config.target_modules = sorted({*config.target_modules, _name_of(model, model.get_input_embeddings())})


def _train_new_tokens(config: PeftConfig, model: PreTrainedModel, new_tokens: Sequence[int]) -> None:
    """Let the rows of new tokens train, also in an output layer that isn't tied to the embedding."""
    if not new_tokens:
        return
    if not hasattr(config, "trainable_token_indices"):
        what = f"{type(config).__name__} can't train the rows of new tokens"
        raise ConfigErrors([Problem("model.add_tokens", what, "use a LoRA adapter (adapter=lora), or leave it empty")])
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
    # PEFT 0.21.2 decomposes every weight as a Linear's; Conv1D stores its weight transposed.
    initialisation = str(getattr(config, "init_lora_weights", None)).lower()
    if initialisation == "olora" and any(isinstance(module, Conv1D) for module in model.modules()):
        what = f"PEFT's olora doesn't support the Conv1D layers of {type(model).__name__}"
        raise ConfigErrors([Problem("adapter.init_lora_weights", what, "use pissa")])


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


def _continue_problems(stored: StoredAdapter, new_tokens: Sequence[int]) -> list[Problem]:
    config = stored.config
    if new_tokens and not getattr(config, "trainable_token_indices", None):
        return [Problem("model.add_tokens", "the adapter at adapter.path has no rows for new tokens", "leave it empty")]
    if changes_base(getattr(config, "init_lora_weights", None)):
        what = f"it is stored as {config.init_lora_weights}, whose base isn't the original one"
        return [Problem(KEY, what, "store it as plain LoRA (path_initial_model_for_weight_conversion of PEFT)")]
    schedule = schedule_of(type(config))
    return schedule.continue_problems(config) if schedule else []


def _base_problems(stored: StoredAdapter, model: PreTrainedModel) -> list[Problem]:
    then, now = stored.config.base_model_name_or_path, model.name_or_path
    # Last parts are compared, so that a folder may move.
    if not then or not now or Path(then).name == Path(now).name:
        return []
    fix = f"set model.path={then}; if that is the same model, write its new name into {stored.folder / CONFIG}"
    return [Problem(KEY, f"the adapter was trained on {then}, and model.path is {now}", fix)]


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
    """Return the fields as JSON stores them, with None for every empty value."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    return {name: value or None for name, value in json.loads(json.dumps(plain, default=str)).items()}
