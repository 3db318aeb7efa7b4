"""The rate for `optimizer.lr=auto`: published or measured for the model, or from the published rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import AUTO_LR, PublishedRate
from loraplus_hydra.config.types import POSITIVE, from_plain, mismatch
from loraplus_hydra.errors import ConfigErrors, UserError, first_line
from loraplus_hydra.loraplus.advice import RULE, is_family_of_rule, published_product, start_factor
from loraplus_hydra.loraplus.invariance import effective_alpha
from loraplus_hydra.loraplus.rules import CONDITIONS, TensorRecord, parse_rules
from loraplus_hydra.loraplus.scale_free import is_adam

# As in a usual layer, to find the rule that decides its rate
_LORA_B = TensorRecord(
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "lora_B",
    "Linear",
    (16, 8),
    owner_classes=("Linear", "torch.nn.modules.linear.Linear"),
)


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
    `loraplus.invariance`), so the rate is rescaled to the config's alpha, and divided by lora_B's multiple of it.
    `base` is the model's PretrainedConfig; without it, its config.json is read. Raises UserError if nothing is
    published.
    """
    if "lr_B" in config.loraplus:
        raise UserError("loraplus.lr_B is a rate of its own, so there is no rate to divide by a ratio; give numbers")
    optimizer, adapter = str(config.optimizer._target_).rpartition(".")[2], config.adapter
    if not is_adam(optimizer):
        raise UserError(f"published rates are those of Adam, not of {optimizer}; give a number")
    if adapter.get("_target_") != "peft.LoraConfig":
        name = str(adapter.get("_target_") or "an adapter that is trained on").rpartition(".")[2]
        raise UserError(f"published rates are those of LoRA, not of {name}; give a number")
    start = str(adapter.get("init_lora_weights", True))
    factor = start_factor(start)
    if factor is None:
        raise UserError(f"nothing is published for adapter.init_lora_weights={start}; give a number")
    product, source = _published(config, base)
    if factor != 1:
        source += f"; times 1/{1 / factor:g} for {start} (arXiv 2602.04998)"
    is_rslora = bool(adapter.get("use_rslora"))
    if adapter.get("alpha_pattern") or (is_rslora and adapter.get("rank_pattern")):
        source += "; not for the layers of adapter.alpha_pattern and rank_pattern"
    alpha = effective_alpha(_positive(adapter, "lora_alpha"), int(_positive(adapter, "r")), rslora=is_rslora)
    return AutoRate(float(f"{factor * product / alpha / _multiple_of_b(config.loraplus):.3g}"), source)


def _positive(adapter: DictConfig, key: str) -> float:
    """Return a number of the adapter's config, by default PEFT's. Raises UserError if it is not above 0."""
    if key in adapter:
        value = adapter[key]
    else:
        from peft import LoraConfig  # imports transformers

        value = getattr(LoraConfig, key)
    if mismatch(value, float, POSITIVE):
        raise UserError(f"adapter.{key}={value} is not a number above 0")
    return float(value)


def _multiple_of_b(loraplus: DictConfig) -> float:
    """Return lora_B's rate as a multiple of optimizer.lr, by the first rule that matches.

    Raises UserError if the rule has a rate of its own, or can't be read.
    """
    for where in ("extra_rules", "rules"):
        for name, rule in (loraplus.get(where) or {}).items():
            # A rate may refer to optimizer.lr, which is not known yet. So only the other keys are resolved
            given = OmegaConf.to_container(rule, resolve=False) if isinstance(rule, DictConfig) else {}
            assert isinstance(given, dict)
            known = {key: _plain(rule[key]) for key in given if key in (*CONDITIONS, "lr_mult", "ratio")}
            try:
                (parsed,) = parse_rules({name: known if isinstance(rule, DictConfig) else rule}) or (None,)
            except ConfigErrors as error:
                raise UserError(first_line(error)) from None
            if parsed is None or not parsed.matches(_LORA_B):
                continue
            if given.get("lr") is not None:
                raise UserError(f"loraplus.{where}.{name}.lr is lora_B's own rate; give a number")
            return parsed.rate(1.0)
    return 1.0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, ListConfig) else value


def _published(config: DictConfig, base: Any) -> tuple[float, str]:
    """Return alpha x eta_B and its source."""
    task = config.task
    for key in ("_target_", "args_class"):
        name = str(task.get(key)).rpartition(".")[2]
        if str(task.get(key)).startswith("trl.") and not name.startswith("SFT"):
            raise UserError(f"published rates are those of training on answers, not of {name}; give a number")
    if given := config.model.get("published_rate"):
        try:
            known = from_plain(PublishedRate, plain_of(given))
        except ValueError as error:
            raise UserError(
                f"model.published_rate needs eta_B, at_alpha and source; wrong or missing: {error}"
            ) from None
        if known.path in (None, config.model.path) and known.task_type in (None, task.task_type):
            return known.eta_B * known.at_alpha, f"{known.source}: {known.eta_B:g} at lora_alpha {known.at_alpha:g}"
    if task.task_type != "CAUSAL_LM":
        raise UserError(f"no rate is published for {config.model.path} and this task; give a number")
    from loraplus_hydra.models.base_model import architecture  # imports transformers

    text: Any = (base or architecture(config.model)).get_text_config()
    width = getattr(text, "hidden_size", None)
    if width is None:
        raise UserError(f"the rule needs a hidden size, which {text.model_type} doesn't have; give a number")
    guess = "" if is_family_of_rule(text.model_type) else f", a guess for {text.model_type}: Llama's power"
    return published_product(text.model_type, width), f"{RULE}, hidden size {width}{guess}"
