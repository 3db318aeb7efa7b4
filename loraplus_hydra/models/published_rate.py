"""The rate for `optimizer.lr=auto`: published or measured for the model, or from the published rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import AUTO_LR, PublishedRate
from loraplus_hydra.config.types import from_plain
from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.advice import RULE, is_family_of_rule, published_product, start_factor
from loraplus_hydra.loraplus.scale_free import is_adam


@dataclass(frozen=True)
class AutoRate:
    """The rate of lora_A, and where it comes from."""

    lr: float
    source: str


def register() -> None:
    """Register the interpolation that replaces `optimizer.lr=auto`."""
    OmegaConf.register_new_resolver(AUTO_LR, lambda *, _root_: auto_rate(_root_).lr, replace=True)


def auto_rate(config: DictConfig, base: Any = None) -> AutoRate:
    """Return the rate of a run's config for `optimizer.lr=auto`.

    Published rates are those of lora_B with Adam. Rate and alpha matter through their product (see
    `loraplus.invariance`), so the rate is rescaled to the config's alpha, and divided by the ratio. `base` is the
    model's PretrainedConfig; without it, its config.json is read. Raises UserError if nothing is published.
    """
    if "lr_B" in config.loraplus:
        raise UserError("loraplus.lr_B is a rate of its own, so there is no rate to divide by a ratio; give numbers")
    optimizer, adapter = str(config.optimizer._target_), config.adapter
    if not is_adam(optimizer.rpartition(".")[2]):
        raise UserError(f"published rates are those of Adam, not of {optimizer.rpartition('.')[2]}; give a number")
    if adapter._target_ != "peft.LoraConfig":
        name = str(adapter._target_).rpartition(".")[2]
        raise UserError(f"published rates are those of LoRA, not of {name}; give a number")
    start = str(adapter.get("init_lora_weights", True))
    factor = start_factor(start)
    if factor is None:
        raise UserError(f"nothing is published for adapter.init_lora_weights={start}; give a number")
    product, source = _published(config, base)
    if factor != 1:
        source += f"; times 1/{1 / factor:g} for {start} (arXiv 2602.04998)"
    alpha = float(adapter.lora_alpha) * (math.sqrt(adapter.r) if adapter.get("use_rslora") else 1)
    ratio = float(config.loraplus.get("ratio", 1))
    return AutoRate(float(f"{factor * product / alpha / ratio:.3g}"), source)


def _published(config: DictConfig, base: Any) -> tuple[float, str]:
    """Return alpha x eta_B and its source."""
    if given := config.model.get("published_rate"):
        try:
            known = from_plain(PublishedRate, plain_of(given))
        except ValueError as error:
            raise UserError(
                f"model.published_rate needs eta_B, at_alpha and source; wrong or missing: {error}"
            ) from None
        return known.eta_B * known.at_alpha, f"{known.source}: {known.eta_B:g} at lora_alpha {known.at_alpha:g}"
    if config.task.task_type != "CAUSAL_LM":
        raise UserError(f"no rate is published for {config.model.path} and this task; give a number")
    from loraplus_hydra.models.base_model import architecture  # imports transformers

    text: Any = (base or architecture(config.model)).get_text_config()
    width = getattr(text, "hidden_size", None)
    if width is None:
        raise UserError(f"the rule needs a hidden size, which {text.model_type} doesn't have; give a number")
    guess = "" if is_family_of_rule(text.model_type) else f", a guess for {text.model_type}: Llama's power"
    return published_product(text.model_type, width), f"{RULE}, hidden size {width}{guess}"
