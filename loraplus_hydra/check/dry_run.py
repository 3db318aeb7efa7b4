"""The run without its weights: rows become examples, the model is built on the meta device, tensors are grouped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line

if TYPE_CHECKING:
    from loraplus_hydra.overview import Placed


def data_problems(config: DictConfig) -> list[Problem]:
    """Load the tokenizer and the rows as the run will; the rows are kept for it."""
    from loraplus_hydra.examples import load_examples
    from loraplus_hydra.model import vocabulary_problems
    from loraplus_hydra.tokenizer import load_tokenizer

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
    from loraplus_hydra.assemble import loraplus_settings
    from loraplus_hydra.model import meta_model
    from loraplus_hydra.overview import place
    from loraplus_hydra.roles import tensor_records
    from loraplus_hydra.whole_head import head_problem

    try:
        model = meta_model(config.model, config.task.auto_class, _model_arguments(config))
    except UserError as error:
        return _problems(error, "model.path")
    try:
        adapted = _adapted(model, config)
    except UserError as error:
        return _problems(error, "adapter")
    except Exception as error:  # PEFT raises whatever comes of its arguments and of this model's layers
        return [_adapter_problem(model, config, error)]
    if problem := head_problem(adapted, config.task._target_):
        return [problem]
    try:
        place(tensor_records(adapted), loraplus_settings(config))
    except UserError as error:
        return _problems(error, "loraplus")
    except Exception as error:  # the optimizer's class, of settings that contradict each other
        return [Problem("optimizer", first_line(error))]
    return []


def placed_on_meta(config: DictConfig) -> tuple[Any, list[Placed]]:
    """The adapted model on the meta device, and its trained tensors, each with its rule and group."""
    from loraplus_hydra.assemble import loraplus_settings
    from loraplus_hydra.overview import place
    from loraplus_hydra.roles import tensor_records

    model = adapted_meta_model(config)
    return model, place(tensor_records(model), loraplus_settings(config))


def adapted_meta_model(config: DictConfig, model_arguments: dict[str, Any] | None = None) -> Any:
    """The config's model with its adapter, on the meta device.

    `model_arguments` is what the rows say of the model; by default what those say that were read for this config.
    """
    from loraplus_hydra.model import meta_model

    arguments = _model_arguments(config) if model_arguments is None else model_arguments
    return _adapted(meta_model(config.model, config.task.auto_class, arguments), config)


def _model_arguments(config: DictConfig) -> dict[str, Any]:
    """What the rows say of the model, such as how many labels there are; nothing while they aren't known."""
    from loraplus_hydra.examples import kept_examples

    examples = kept_examples(config)
    return examples.model_arguments if examples else {}


def _adapted(model: Any, config: DictConfig) -> Any:
    from loraplus_hydra.adapter import add_adapter

    rows = model.get_input_embeddings().weight.shape[0]
    new_tokens = range(rows - len(config.model.add_tokens), rows)
    return add_adapter(model, config.adapter, config.task.task_type, new_tokens=new_tokens, on_meta=True)


def _adapter_problem(model: Any, config: DictConfig, error: Exception) -> Problem:
    from loraplus_hydra.adapter import possible_targets

    text = first_line(error)
    if "target" in text.lower():
        targets = ", ".join(possible_targets(model))
        return Problem(
            "adapter.target_modules", text, f"layers of this model that it can name: {targets}; or all-linear"
        )
    return Problem("adapter", text)


def _problems(error: UserError, key: str) -> list[Problem]:
    return list(error.problems) if isinstance(error, ConfigErrors) else [Problem(key, str(error))]
