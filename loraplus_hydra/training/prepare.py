"""Preparation of a run: tokenizer, examples, model with adapter, and plan of the groups.

`plan_on_meta` prepares model and plan without weights, on the meta device, for `check`, `inspect` and `preview`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed

from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import interrupts, screen
from loraplus_hydra.io.time_limit import TooSlowError, time_limit
from loraplus_hydra.loraplus.memory import measure_state
from loraplus_hydra.loraplus.peft_layers import LOFTQ
from loraplus_hydra.loraplus.plan import Plan
from loraplus_hydra.loraplus.rules import parse_rules
from loraplus_hydra.loraplus.settings import LoraPlus
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.base_model import load_base, load_model, meta_model
from loraplus_hydra.models.inputs import adapter_fingerprint, base_fingerprints, tokenizer_fingerprint
from loraplus_hydra.models.loftq import initialise_loftq
from loraplus_hydra.models.properties import (
    adapter_labels,
    is_classifier,
    mark_new_layers,
    positions,
    trained_head,
    trained_positions,
)
from loraplus_hydra.models.tokenizer import load_tokenizer, new_token_ids
from loraplus_hydra.tasks.base import Base
from loraplus_hydra.tasks.examples import Examples, load_examples
from loraplus_hydra.tasks.template import set_template
from loraplus_hydra.training.forgetting import OtherText, read_pieces
from loraplus_hydra.training.reference import adds_reference

_PLANNING_SECONDS = 60.0


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs for training."""

    config: DictConfig
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    model: PeftModel
    settings: LoraPlus
    plan: Plan
    inputs: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the inputs, see io/fingerprints.py
    other: OtherText | None = None  # the rows of `forgetting`, with the base model's loss


def prepare(config: DictConfig, *, resumed: bool = False) -> Prepared:
    """Load tokenizer, examples and model, add the adapter, and plan the groups.

    `resumed` is True if a checkpoint's adapter is loaded next. Raises UserError.
    """
    screen.show("2/6 Loading the data and the tokenizer")
    interrupts.stop_if_asked()
    tokenizer = load_tokenizer(config.model)
    examples = prepare_examples(config, tokenizer)
    screen.show(f"    {examples.counts()}")
    for note in examples.notes:
        screen.show(f"    Note: {note}")
    interrupts.stop_if_asked()
    screen.show("3/6 Loading the model and adding the adapter")
    other = None if config.forgetting is None else OtherText(read_pieces(config.forgetting, config, tokenizer))
    model = load_adapted_model(config, tokenizer, examples, other, resumed=resumed)
    interrupts.stop_if_asked()
    screen.show("4/6 Deciding which tensor gets which rate")
    inputs = inputs_of(config, tokenizer, examples.fingerprints)
    return replace(bundle(config, tokenizer, examples, model), inputs=inputs, other=other)


def inputs_of(config: DictConfig, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, str]) -> dict[str, str]:
    """Return the fingerprints of a config's inputs. `rows` has the rows' fingerprints.

    Weights that are not on this machine yet have no fingerprint.
    """
    set_template(tokenizer, config.task)  # the template in a file is also an input
    found = {
        **rows,
        **base_fingerprints(config.model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    if path := config.adapter.get("path"):
        found["adapter.path"] = adapter_fingerprint(path)
    return found


def prepare_examples(config: DictConfig, tokenizer: PreTrainedTokenizerBase, *, keep: bool = False) -> Examples:
    """Return the examples of the config's rows for the weights that training begins from.

    With `keep`, the examples are cached for the next call with the same config. Raises ConfigErrors.
    """
    return load_examples(config, tokenizer, base_of(config), keep=keep)


def base_of(config: DictConfig) -> Base:
    """Return the properties of the weights that training begins from. Raises ConfigErrors."""
    limits = Base(
        positions=positions(config.model, config.task.auto_class), trained_positions=trained_positions(config.model)
    )
    if not is_classifier(config):
        return limits
    outputs, labels = trained_head(config.model)
    if config.adapter.get("path") and (stored := adapter_labels(config.adapter.path)):
        if config.task.get("new_head"):
            what = f"the adapter in {config.adapter.path} has a trained head, which would be loaded"
            raise ConfigErrors([Problem("task.new_head", what, "set it to false, or use a new adapter")])
        return replace(limits, labels=stored, head="the head of adapter.path")
    return replace(limits, labels=labels, replaceable=True, unnamed_outputs=0 if labels else outputs)


def bundle(config: DictConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples, model: PeftModel) -> Prepared:
    """Return a Prepared with the loaded parts and the plan of the model's groups. Raises UserError."""
    return Prepared(config, tokenizer, examples, model, *plan_groups(config, model))


def load_adapted_model(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    other: OtherText | None = None,
    *,
    resumed: bool = False,
) -> PeftModel:
    """Load the base model with its weights, measure its loss on `other`, and add the adapter.

    With `resumed`, LoftQ's start isn't computed, because a checkpoint replaces it, unless it is also DPO's reference.
    """
    set_seed(config.seed)  # for the adapter's initialisation
    base = load_base(config, tokenizer, examples.model_arguments)
    mark_new_layers(base, config)
    if other is not None:
        other.measure_base(base, config)
    adapted = add_adapter(
        base,
        config.adapter,
        config.task.task_type,
        new_tokens=new_token_ids(tokenizer, config.model),
        revision=config.model.revision,
    )
    replaced = resumed and not adds_reference(locate(config.task._target_))
    if config.adapter.get("init_lora_weights") == LOFTQ and not (replaced or config.adapter.get("path")):
        original = load_model(config.model, config.task.auto_class, examples.model_arguments)
        removed = initialise_loftq(adapted, original)
        screen.show(f"    LoftQ: A and B remove {removed:.0%} of the squared error of the 4-bit weights")
    return adapted


def plan_on_meta(config: DictConfig) -> tuple[PeftModel, Plan]:
    """Return the adapted model on the meta device and the plan of its groups. Raises UserError."""
    model = add_meta_adapter(meta_model(config.model, config.task.auto_class), config)
    return model, plan_groups(config, model)[1]


def plan_groups(config: DictConfig, model: PeftModel) -> tuple[LoraPlus, Plan]:
    """Return a config's LoRA+ settings and the plan of the model's groups. Raises UserError."""
    settings = loraplus_settings(config)
    try:
        with time_limit(_PLANNING_SECONDS):  # matching an untrusted config's patterns may never end
            plan = settings.plan(model)
    except TooSlowError as error:
        raise UserError(f"loraplus.rules: the patterns can't be matched with the tensors' names: {error}") from None
    return settings, measure_state(plan, settings)


def add_meta_adapter(model: Any, config: DictConfig) -> PeftModel:
    """Add the config's adapter to a model on the meta device.

    The embedding's last rows are the new tokens of `model.add_tokens`.
    """
    mark_new_layers(model, config)
    rows = model.get_input_embeddings().weight.shape[0]
    new_tokens = range(rows - len(config.model.add_tokens), rows)
    return add_adapter(model, config.adapter, config.task.task_type, new_tokens=new_tokens, on_meta=True)


def loraplus_settings(config: DictConfig) -> LoraPlus:
    """Return the `optimizer`, `scheduler` and `loraplus` groups of a config as `LoraPlus`."""
    optimizer, scheduler, loraplus = (plain_of(config[name]) for name in ("optimizer", "scheduler", "loraplus"))
    return LoraPlus(
        optimizer_class=locate(optimizer.pop("_target_")),
        # Also stays in the arguments, because schedules with a smallest rate are relative to this default
        lr=optimizer["lr"],
        weight_decay=optimizer.pop("weight_decay", 0.0),
        optimizer_arguments=optimizer,
        rules=parse_rules(loraplus["rules"], where="loraplus.rules"),
        extra_rules=parse_rules(loraplus.get("extra_rules") or {}, where="loraplus.extra_rules"),
        schedule=locate(scheduler.pop("_target_")),
        schedule_arguments=scheduler,
    )
