"""The run without its weights: rows become examples, the model is built on the meta device, tensors are grouped."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line


def data_problems(config: DictConfig) -> list[Problem]:
    """Load the tokenizer and the rows as the run will; the rows are kept for it."""
    from loraplus_hydra.models.base_model import vocabulary_problems
    from loraplus_hydra.models.tokenizer import load_tokenizer
    from loraplus_hydra.tasks.examples import load_examples

    try:
        tokenizer = load_tokenizer(config.model)
    except UserError as error:
        return _problems(error, "model.tokenizer")
    except Exception as error:  # transformers raises whatever the file or the network gives it
        fix = "name a folder with a tokenizer, or a model on the hub"
        return [Problem("model.tokenizer" if config.model.tokenizer else "model.path", first_line(error), fix)]
    try:
        if problems := vocabulary_problems(config.model, tokenizer):
            return problems
    except UserError as error:
        return _problems(error, "model.path")
    try:
        load_examples(config, tokenizer, keep=True)
    except UserError as error:
        return _problems(error, "data")
    return []


def model_problems(config: DictConfig) -> list[Problem]:
    """Build the model on the meta device, add the adapter, and group its tensors for the optimizer."""
    from loraplus_hydra.loraplus.memory import measure_state
    from loraplus_hydra.models.base_model import meta_model
    from loraplus_hydra.tasks.examples import kept_examples
    from loraplus_hydra.training.hf_trainer.whole_head import head_problem
    from loraplus_hydra.training.prepare import add_meta_adapter, loraplus_settings

    examples = kept_examples(config)
    try:
        model = meta_model(config.model, config.task.auto_class, examples.model_arguments if examples else {})
    except UserError as error:
        return _problems(error, "model.path")
    try:
        adapted = add_meta_adapter(model, config)
    except UserError as error:
        return _problems(error, "adapter")
    except Exception as error:  # PEFT raises whatever comes of its arguments and of this model's layers
        return [_adapter_problem(model, config, error)]
    if problem := head_problem(adapted, config.task._target_):
        return [problem]
    try:
        settings = loraplus_settings(config)
        measure_state(settings.plan(adapted), settings)
    except UserError as error:
        return _problems(error, "loraplus")
    except Exception as error:  # the optimizer's class, of settings that contradict each other
        return [Problem("optimizer", first_line(error))]
    return []


def _adapter_problem(model: Any, config: DictConfig, error: Exception) -> Problem:
    from loraplus_hydra.models.adapter import possible_targets

    text = first_line(error)
    if "target" in text.lower():
        targets = ", ".join(possible_targets(model))
        return Problem(
            "adapter.target_modules", text, f"layers of this model that it can name: {targets}; or all-linear"
        )
    return Problem("adapter", text)


def _problems(error: UserError, key: str) -> list[Problem]:
    return list(error.problems) if isinstance(error, ConfigErrors) else [Problem(key, str(error))]
