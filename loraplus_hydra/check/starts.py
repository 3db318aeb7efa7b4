"""Checks of `adapter.init_lora_weights` with the settings that a start needs."""

from __future__ import annotations

from typing import Any

from peft import EvaConfig, LoraConfig

from loraplus_hydra.check.kinds import TARGET
from loraplus_hydra.check.signatures import argument_problems
from loraplus_hydra.config.schema import SHARE
from loraplus_hydra.config.types import Range, is_finite, mismatch
from loraplus_hydra.errors import Problem
from loraplus_hydra.loraplus.peft_layers import EVA, LOFTQ

KEY = "adapter.init_lora_weights"
# Starts that need more than a PEFT config. Without it, PEFT silently uses another start.
_UNSUPPORTED = {
    "corda": "it first needs covariances for the data (peft.tuners.lora.corda.preprocess_corda)",
    "lora_ga": "it first needs gradients for the data (peft.preprocess_loraga)",
}
_FROM_LAYERS = ("pissa", "olora", "orthogonal")  # beginnings of the starts for which PEFT needs a layer's weight
_SETTINGS = "adapter.eva_config"
_RANGES = {"rho": Range("a finite number from 1 on", lambda x: is_finite(x) and x >= 1), "tau": SHARE}
_SUPPORTED = "use true, a_zero, gaussian, orthogonal, pissa, olora, eva or loftq"


def start_problems(config_class: type, plain: dict[str, Any]) -> list[Problem]:
    """Return the errors of an adapter's start. `config_class` is the class of its PEFT config."""
    adapter = plain.get("adapter", {})
    start = adapter.get("init_lora_weights")
    if not isinstance(start, str):
        return []
    if reason := _UNSUPPORTED.get(start.lower()):
        return [Problem(KEY, f"'{start}' isn't supported: {reason}", _SUPPORTED)]
    if start.lower().startswith(_FROM_LAYERS) and not adapter.get("path"):
        return _experts(adapter, start)
    if start not in (EVA, LOFTQ) or adapter.get("path"):  # a stored adapter has started before
        return []
    if config_class is not LoraConfig:
        what = f"{start} is a start of plain LoRA, and adapter._target_ is {config_class.__name__}"
        return [Problem(KEY, what, "use adapter._target_=peft.LoraConfig, or true")]
    trainer = plain.get("trainer", {})
    sharded = [key for key in ("fsdp", "deepspeed") if trainer.get(key)]
    what = f"may split the base model, and {start} needs all of it"
    problems = [Problem(f"trainer.{key}", what, "use trainer=ddp or default, or adapter=lora") for key in sharded]
    if start == EVA:
        return [*problems, *_eva(adapter, plain.get("data", {}))]
    return [*problems, *_loftq(adapter, plain.get("quantization", {}))]


def _experts(adapter: dict[str, Any], start: str) -> list[Problem]:
    given = adapter.get("target_parameters")
    # Of a parameter with this name, PEFT finds the layer
    others = [name for name in given if str(name).rpartition(".")[2] != "weight"] if isinstance(given, list) else []
    if not others:
        return []
    what = f"{start} starts from the weights of layers, and '{others[0]}' is a parameter, such as those of experts"
    return [Problem("adapter.target_parameters", what, "remove it, or use adapter=lora")]


def _eva(adapter: dict[str, Any], data: dict[str, Any]) -> list[Problem]:
    problems = []
    if adapter.get("target_parameters"):
        what = "EVA starts layers, and these are parameters, such as those of experts"
        problems.append(Problem("adapter.target_parameters", what, "remove it, or use adapter=lora"))
    given = adapter.get("eva_config")
    settings = {key: value for key, value in given.items() if key != TARGET} if isinstance(given, dict) else {}
    problems += argument_problems(EvaConfig, settings, _SETTINGS)
    for name, limits in _RANGES.items():
        if (value := settings.get(name)) is not None and mismatch(value, float, limits):
            problems.append(Problem(f"{_SETTINGS}.{name}", f"{value} is out of range", f"it must be {limits.text}"))
    if adapter.get("use_rslora") and settings.get("rho", 2) != 1 and settings.get("adjust_scaling_factors", True):
        what = "it keeps alpha / r equal in all layers, but rsLoRA scales by alpha / sqrt(r)"
        problems.append(Problem(f"{_SETTINGS}.adjust_scaling_factors", what, "set it to false"))
    if data.get("streaming"):
        what = "EVA's pass reads the rows before the training does, and a stream is read once"
        problems.append(Problem("data.streaming", what, "set it to false, or use adapter=lora"))
    return problems


def _loftq(adapter: dict[str, Any], quantization: dict[str, Any]) -> list[Problem]:
    problems = []
    if not quantization.get("load_in_4bit"):
        what = "loftq starts from the error of bitsandbytes' 4-bit weights, which the base model doesn't have"
        if not quantization.get("_target_"):
            what += ". PEFT's loftq would round its weights, which an adapter can't store"
        problems.append(Problem(KEY, what, "use quantization=nf4, or adapter=pissa"))
    if adapter.get("use_dora"):
        what = "PEFT computes DoRA's magnitudes from the quantised weights, without the correction that loftq makes"
        problems.append(Problem("adapter.use_dora", what, "set it to false"))
    if adapter.get("loftq_config"):
        what = "it would have no effect: bits are set in quantization, and more iterations would change the base"
        problems.append(Problem("adapter.loftq_config", what, "remove it"))
    return problems
