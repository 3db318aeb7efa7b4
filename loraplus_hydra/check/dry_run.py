"""A run without weights: rows, model on the meta device, and parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.config.schema import ModelConfig
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, errors_at, first_line, nearest, refuse
from loraplus_hydra.loraplus.plan import Plan
from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.models.adapter import possible_targets
from loraplus_hydra.models.base_model import meta_model, vocabulary_problems
from loraplus_hydra.models.eva import eva_problems
from loraplus_hydra.models.properties import adapter_labels, is_classifier
from loraplus_hydra.models.token_rows import new_token_problems
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from loraplus_hydra.training.forgetting import read_pieces
from loraplus_hydra.training.hf_trainer.step_memory import EMBEDDED
from loraplus_hydra.training.hf_trainer.whole_head import head_problem
from loraplus_hydra.training.prepare import add_meta_adapter, plan_groups, prepare_examples
from loraplus_hydra.training.reference import reference_problem

FAR_ABOVE = 10  # times the largest dimension of a layer; such a rank would only fill the memory


def load_data(config: DictConfig) -> Examples:
    """Load the tokenizer and the run's examples, which are cached for the run. Raises ConfigErrors."""
    try:
        tokenizer = _load_tokenizer(config)
    except ConfigErrors as errors:
        raise ConfigErrors([*errors.problems, *data_problems(config)]) from errors
    problems = _missing_tokens(config.task.args, tokenizer)
    with errors_at("data"):
        examples = prepare_examples(config, tokenizer, keep=True)
    refuse(problems)
    return examples


def check_other_text(config: DictConfig) -> None:
    """Check the rows of `forgetting`. Raises ConfigErrors."""
    if config.forgetting is None:
        return
    sharded = next((key for key in ("fsdp", "deepspeed") if config.trainer.get(key)), None)
    if sharded is not None:
        what = f"trainer.{sharded} may split the base model, which is measured whole"
        raise ConfigErrors([Problem("forgetting", what, "leave it out, and run: evaluate RUN forgetting=...")])
    read_pieces(config.forgetting, config, load_tokenizer(config.model))


def data_problems(config: DictConfig) -> list[Problem]:
    """Check the rows of a config whose tokenizer can't be loaded.

    The built-in model's tokenizer is used instead.
    """
    stand_in: DictConfig = OmegaConf.structured(ModelConfig(path=EMBEDDED))
    try:
        load_examples(config, load_tokenizer(stand_in))
    except ConfigErrors as errors:
        return [problem for problem in errors.problems if problem.key.split(".")[0] == "data"]
    except Exception:  # the error may be due to the other tokenizer, which has other tokens and another template
        return []
    return []


def _missing_tokens(args: DictConfig, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Check the tokens in TRL's arguments. TRL itself checks them only after the model is loaded."""
    vocabulary = tokenizer.get_vocab()
    return [
        Problem(f"task.args.{key}", f"the tokenizer has no token '{args[key]}'{nearest(args[key], vocabulary)}")
        for key in ("pad_token", "eos_token")
        if args.get(key) is not None and args[key] not in vocabulary
    ]


def _load_tokenizer(config: DictConfig) -> PreTrainedTokenizerBase:
    key = "model.tokenizer" if config.model.tokenizer else "model.path"
    fix = "give a folder with a tokenizer, or a model on the hub"
    with errors_at("model.tokenizer"), _any_error_as(lambda text: Problem(key, text, fix)):
        tokenizer = load_tokenizer(config.model)
    with errors_at("model.path"):
        refuse(vocabulary_problems(config.model, tokenizer))
    return tokenizer


def plan_without_weights(config: DictConfig, examples: Examples | None) -> tuple[PeftModel, Plan]:
    """Return the model with its adapter on the meta device, and the plan of its groups.

    Raises ConfigErrors.

    A classifier's labels come from `examples`. With None, they are those of a stored adapter, or else of the model.
    """
    with errors_at("model.path"):
        arguments = examples.model_arguments if examples else _stored_labels(config)
        model = meta_model(config.model, config.task.auto_class, arguments)
    with errors_at("adapter"), _any_error_as(lambda text: _adapter_problem(model, text)):
        adapted = add_meta_adapter(model, config)
    problems = [
        head_problem(adapted, config.task._target_),
        reference_problem(adapted, locate(config.task._target_)),
        _rank_problem(adapted),
        _token_problem(adapted),
    ]
    refuse(
        [
            *(problem for problem in problems if problem is not None),
            *eva_problems(adapted),
            *([] if examples is None else _continued_tokens(config)),
        ]
    )
    # The optimizer's class may refuse a combination of settings.
    with errors_at("loraplus"), _any_error_as(lambda text: Problem("optimizer", text)):
        return adapted, plan_groups(config, adapted)[1]


def _continued_tokens(config: DictConfig) -> list[Problem]:
    """Check that new tokens are those of the adapter that training begins from. This needs the tokenizer."""
    path = config.adapter.get("path")
    if not path or not config.model.add_tokens:
        return []
    return new_token_problems(path, load_tokenizer(config.model), config.model)


def _stored_labels(config: DictConfig) -> dict[str, Any]:
    """Return the number of labels of the adapter that training begins from, if it names its labels."""
    path = config.adapter.get("path")
    labels = adapter_labels(path) if path and is_classifier(config) else ()
    return {"num_labels": len(labels)} if labels else {}


@contextmanager
def _any_error_as(problem: Callable[[str], Problem]) -> Iterator[None]:
    """Turn any error of a library inside the block into ConfigErrors. UserErrors stay unchanged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigErrors([problem(first_line(error))]) from error


def _rank_problem(model: PeftModel) -> Problem | None:
    """Return a Problem for a rank far above the dimensions of the adapted layers, probably a typo."""
    factors = [record for record in tensor_records(model) if record.role in ("lora_A", "lora_B")]
    # Not from the shapes, because those of fused experts have the ranks of all experts
    by_layer = [ranks for module in model.modules() if isinstance(ranks := getattr(module, "r", None), dict)]
    ranks = [rank for each in by_layer for rank in each.values()]
    sides = [max(record.shape[1:], default=0) if record.role == "lora_A" else record.shape[0] for record in factors]
    if not ranks or not sides or max(ranks) <= FAR_ABOVE * max(sides):
        return None
    what = f"{max(ranks)} is far above the largest dimension of the adapted layers' weights, {max(sides)}"
    return Problem("adapter.r", what, "use a much smaller rank: 8, 16, 64")


def _token_problem(model: PeftModel) -> Problem | None:
    """Return a Problem for ids of trainable tokens that the vocabulary doesn't have."""
    key = "trainable_token_indices"
    given = getattr(model.active_peft_config, key, None) or []  # only some PEFT configs have this field
    ids = [each for part in given.values() for each in part] if isinstance(given, dict) else given
    rows = model.get_input_embeddings().weight.shape[0]
    wrong = [each for each in ids if not 0 <= each < rows]
    if not wrong:
        return None
    return Problem(f"adapter.{key}", f"there is no token {wrong[0]}", f"the vocabulary has ids from 0 to {rows - 1}")


def _adapter_problem(model: Any, text: str) -> Problem:
    if "target" not in text.lower():
        return Problem("adapter", text)
    targets = ", ".join(possible_targets(model))
    return Problem("adapter.target_modules", text, f"this model has the layers {targets}; all-linear is also valid")
