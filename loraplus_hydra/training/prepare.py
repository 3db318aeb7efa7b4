"""Prepare what a job trains with: LoRA+ settings, model with adapter, and the same without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.targets import locate
from loraplus_hydra.loraplus.grouping import parse_rules
from loraplus_hydra.loraplus.settings import LoraPlus

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from loraplus_hydra.loraplus.plan import Placed
    from loraplus_hydra.tasks.examples import Examples


def loraplus_settings(config: DictConfig) -> LoraPlus:
    """The `optimizer`, `scheduler` and `loraplus` groups of a config as the mixin takes them."""
    optimizer = _plain(config.optimizer)
    scheduler = _plain(config.scheduler)
    loraplus = _plain(config.loraplus)
    return LoraPlus(
        optimizer_class=locate(optimizer.pop("_target_")),
        lr=optimizer["lr"],  # stays among the arguments too: schedules with a floor measure it against this default
        weight_decay=optimizer.pop("weight_decay", 0.0),
        optimizer_arguments=optimizer,
        rules=parse_rules(loraplus["rules"], where="loraplus.rules"),
        extra_rules=parse_rules(loraplus.get("extra_rules") or {}, where="loraplus.extra_rules"),
        schedule=locate(scheduler.pop("_target_")),
        schedule_arguments=scheduler,
    )


def _plain(group: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(group, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def placed_on_meta(config: DictConfig) -> tuple[Any, list[Placed]]:
    """The adapted model on the meta device, and its trained tensors, each with its rule and group."""

    from loraplus_hydra.loraplus.plan import place
    from loraplus_hydra.loraplus.roles import tensor_records

    model = adapted_meta_model(config)
    return model, place(tensor_records(model), loraplus_settings(config))


def adapted_meta_model(config: DictConfig, model_arguments: dict[str, Any] | None = None) -> Any:
    """The config's model with its adapter, on the meta device.

    `model_arguments` is what the rows say of the model; by default what those say that were read for this config.
    """
    from loraplus_hydra.models.base_model import meta_model

    arguments = _model_arguments(config) if model_arguments is None else model_arguments
    return _adapted(meta_model(config.model, config.task.auto_class, arguments), config)


def _model_arguments(config: DictConfig) -> dict[str, Any]:
    """What the rows say of the model, such as how many labels there are; nothing while they aren't known."""
    from loraplus_hydra.tasks.examples import kept_examples

    examples = kept_examples(config)
    return examples.model_arguments if examples else {}


def _adapted(model: Any, config: DictConfig) -> Any:
    from loraplus_hydra.models.adapter import add_adapter

    rows = model.get_input_embeddings().weight.shape[0]
    new_tokens = range(rows - len(config.model.add_tokens), rows)
    return add_adapter(model, config.adapter, config.task.task_type, new_tokens=new_tokens, on_meta=True)


def _load_model(config: DictConfig, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> PeftModel:
    from transformers import set_seed

    from loraplus_hydra.models.adapter import add_adapter
    from loraplus_hydra.models.base_model import load_base
    from loraplus_hydra.models.tokenizer import new_token_ids

    set_seed(config.seed)  # the adapter's initialisation
    return add_adapter(
        load_base(config, tokenizer, examples.model_arguments),
        config.adapter,
        config.task.task_type,
        new_tokens=new_token_ids(tokenizer, config.model),
        revision=config.model.revision,
    )
