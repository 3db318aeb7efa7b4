"""The run without its weights: rows become examples, the model is built on the meta device, tensors are grouped."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.errors import ConfigErrors, Problem, UserError


def data_problems(config: DictConfig) -> list[Problem]:
    """Load the tokenizer and the rows as the run will; the rows are kept for it."""
    from loraplus_hydra.examples import load_examples
    from loraplus_hydra.model import load_tokenizer

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
    """Build the model on the meta device, add the adapter, group its tensors, and try the schedule on the groups."""
    from loraplus_hydra.model import meta_model

    try:
        model = meta_model(config.model, config.task.auto_class)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return [Problem("model.path", _first_line(error), "name a model's folder, or a model on the hub")]
    try:
        adapted = _adapted(model, config)
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError, RuntimeError) as error:
        return [_adapter_problem(model, config, error)]
    try:
        _grouped(adapted, config)
    except UserError as error:
        return _problems(error, "loraplus")
    return []


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


def _grouped(model: Any, config: DictConfig) -> None:
    """Group the tensors, and make the optimizer over stand-ins of one number each: it takes the groups' settings."""
    import torch

    from loraplus_hydra.assemble import loraplus_settings
    from loraplus_hydra.grouping import assign
    from loraplus_hydra.optimizer import build_optimizer
    from loraplus_hydra.roles import tensor_records

    settings = loraplus_settings(config)
    records = tensor_records(model)
    groups = assign(records, settings.rules, extra=settings.extra_rules, lr=settings.lr, weight_decay=settings.weight_decay)
    stand_ins = [(record.name, torch.nn.Parameter(torch.zeros((1,) * record.ndim))) for record in records]
    build_optimizer(settings.optimizer_class, groups, stand_ins, settings.optimizer_arguments)


def _problems(error: UserError, key: str) -> list[Problem]:
    return list(error.problems) if isinstance(error, ConfigErrors) else [Problem(key, str(error))]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
