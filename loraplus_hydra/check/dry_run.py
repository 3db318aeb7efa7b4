"""A run without its weights: load the rows, build the model on the meta device, plan its parameter groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line
from loraplus_hydra.loraplus.memory import measure_state
from loraplus_hydra.loraplus.plan import Plan
from loraplus_hydra.models.adapter import possible_targets
from loraplus_hydra.models.base_model import meta_model, vocabulary_problems
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from loraplus_hydra.training.hf_trainer.whole_head import head_problem
from loraplus_hydra.training.prepare import add_meta_adapter, loraplus_settings

if TYPE_CHECKING:
    from peft import PeftModel


def load_data(config: DictConfig) -> Examples:
    """Load the tokenizer and the rows as the run will; the rows are kept for it. Raises ConfigErrors."""
    with _errors_at("model.tokenizer"):
        try:
            tokenizer = load_tokenizer(config.model)
        except UserError:
            raise
        except Exception as error:  # transformers raises whatever the file or the network gives it
            key = "model.tokenizer" if config.model.tokenizer else "model.path"
            fix = "name a folder with a tokenizer, or a model on the hub"
            raise ConfigErrors([Problem(key, first_line(error), fix)]) from error
    with _errors_at("model.path"):
        if problems := vocabulary_problems(config.model, tokenizer):
            raise ConfigErrors(problems)
    with _errors_at("data"):
        return load_examples(config, tokenizer, keep=True)


def plan_without_weights(config: DictConfig, examples: Examples | None) -> tuple[PeftModel, Plan]:
    """Return the model with its adapter on the meta device, and the plan of its groups. Raises ConfigErrors.

    `examples` are the rows' examples, on which a classifier's labels depend; None leaves the model's own.
    """
    with _errors_at("model.path"):
        model = meta_model(config.model, config.task.auto_class, examples.model_arguments if examples else {})
    with _errors_at("adapter"):
        try:
            adapted = add_meta_adapter(model, config)
        except UserError:
            raise
        except Exception as error:  # PEFT's errors for its arguments on this model's layers have many types
            raise ConfigErrors([_adapter_problem(model, first_line(error))]) from error
    if problem := head_problem(adapted, config.task._target_):
        raise ConfigErrors([problem])
    with _errors_at("loraplus"):
        try:
            settings = loraplus_settings(config)
            return adapted, measure_state(settings.plan(adapted), settings)
        except UserError:
            raise
        except Exception as error:  # the optimizer's class refuses a combination of settings
            raise ConfigErrors([Problem("optimizer", first_line(error))]) from error


def _adapter_problem(model: Any, text: str) -> Problem:
    if "target" not in text.lower():
        return Problem("adapter", text)
    targets = ", ".join(possible_targets(model))
    return Problem("adapter.target_modules", text, f"layers of this model that it can name: {targets}; or all-linear")


@contextmanager
def _errors_at(key: str) -> Iterator[None]:
    """Turn a UserError raised inside into a Problem at `key`."""
    try:
        yield
    except ConfigErrors:
        raise
    except UserError as error:
        raise ConfigErrors([Problem(key, str(error))]) from error
