"""The run without its weights: rows become examples, the model is built on the meta device, tensors are grouped."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.errors import ConfigErrors, Problem, UserError


def data_problems(config: DictConfig) -> list[Problem]:
    """Load the tokenizer and the rows as the run will; the rows are kept for it."""
    from loraplus_hydra.examples import load_examples
    from loraplus_hydra.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.model)
    except UserError as error:
        return _problems(error, "model.tokenizer")
    except Exception as error:  # transformers raises whatever the file or the network gives it
        fix = "name a folder with a tokenizer, or a model on the hub"
        return [Problem("model.tokenizer" if config.model.tokenizer else "model.path", _first_line(error), fix)]
    try:
        load_examples(config, tokenizer, keep=True)
    except UserError as error:
        return _problems(error, "data")
    return []


def model_problems(config: DictConfig) -> list[Problem]:
    """Build the model on the meta device, add the adapter, and group its tensors for the optimizer."""
    from loraplus_hydra.assemble import loraplus_settings
    from loraplus_hydra.model import meta_model
    from loraplus_hydra.overview import place
    from loraplus_hydra.roles import tensor_records

    try:
        model = meta_model(config.model, config.task.auto_class)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return [Problem("model.path", _first_line(error), "name a model's folder, or a model on the hub")]
    try:
        adapted = _adapted(model, config)
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError, RuntimeError) as error:
        return [_adapter_problem(model, config, error)]
    try:
        place(tensor_records(adapted), loraplus_settings(config))
    except UserError as error:
        return _problems(error, "loraplus")
    return []


def adapted_meta_model(config: DictConfig) -> Any:
    """The config's model with its adapter, on the meta device."""
    from loraplus_hydra.model import meta_model

    return _adapted(meta_model(config.model, config.task.auto_class), config)


def _adapted(model: Any, config: DictConfig) -> Any:
    from peft import get_peft_model

    from loraplus_hydra.adapter import adapter_config

    return get_peft_model(model, adapter_config(config.adapter, config.task.task_type), low_cpu_mem_usage=True)


def _adapter_problem(model: Any, config: DictConfig, error: Exception) -> Problem:
    from loraplus_hydra.adapter import possible_targets

    text = _first_line(error)
    if "target" in text.lower():
        targets = ", ".join(possible_targets(model))
        return Problem("adapter.target_modules", text, f"layers of this model that it can name: {targets}; or all-linear")
    return Problem("adapter", text)


def _problems(error: UserError, key: str) -> list[Problem]:
    return list(error.problems) if isinstance(error, ConfigErrors) else [Problem(key, str(error))]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
