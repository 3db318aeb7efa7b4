"""Checks of the classes and functions in a config.

They must exist, be valid for their key, and accept their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch.optim import Optimizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loraplus_hydra.check.adapter import adapter_problems, quantization_problems
from loraplus_hydra.check.deepspeed import joined_tensors_refusal
from loraplus_hydra.check.keys import NOT_SET
from loraplus_hydra.check.kinds import TARGET, derives, is_peft_settings, makes_schedule, resolve, returns_rows
from loraplus_hydra.check.signatures import argument_problems
from loraplus_hydra.check.starts import start_problems
from loraplus_hydra.check.task import task_problems
from loraplus_hydra.data.rows import loader_arguments
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line
from loraplus_hydra.loraplus.factor_pairs import NEEDS_WHOLE, PairedOptimizer
from loraplus_hydra.loraplus.optimizer_check import class_refusal, ignored_rates, optimizer_problems
from loraplus_hydra.loraplus.rules import parse_rules
from loraplus_hydra.loraplus.schedule import build_schedule, falls, fill_arguments
from loraplus_hydra.loraplus.schedule_free import NOT_CONSTANT, ScheduleFree
from loraplus_hydra.models.adapter import schedule_of
from loraplus_hydra.training.trackers.tracker import Tracker

# Groups with a `_target_`. Inside `adapter` there may be other targets, for PEFT's nested configs.
PLACES = ("quantization", "adapter", "optimizer", "scheduler", "task", "data", "logger")


def class_problems(plain: dict[str, Any]) -> list[Problem]:
    """Return the errors of all classes and functions in the config."""
    checks = (_unset, _adapter, _quantization, _optimizer, _scheduler, _average, task_problems, _data, _logger, _rules)
    return [*_stray_targets(plain, ""), *(problem for check in checks for problem in check(plain))]


def _unset(plain: dict[str, Any]) -> list[Problem]:
    """Return a Problem for each group without the class or function that a run needs."""
    fixes = {"optimizer": "optimizer=adamw", "scheduler": "scheduler=linear", "data": "data=jsonl"}
    return [
        Problem(f"{group}.{TARGET}", NOT_SET, f"use an option of the group, such as {fix}")
        for group, fix in fixes.items()
        if plain.get(group, {}).get(TARGET) is None
    ]


def _stray_targets(node: Any, path: str) -> Iterator[Problem]:
    """Yield a Problem for each `_target_` at a key that doesn't allow one."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _stray_targets(item, f"{path}.{index}")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        key_path = f"{path}.{key}" if path else key
        if key == TARGET and path.startswith("adapter.") and str(value).startswith("peft."):
            wanted = "one of PEFT's settings, such as peft.LoftQConfig"
            yield from resolve(value, key_path, is_peft_settings, wanted)[1]
        elif key == TARGET and path not in PLACES:
            fix = f"remove it; {TARGET} is allowed in {', '.join(PLACES)}"
            yield Problem(key_path, f"'{value}' is not allowed here, because nothing is instantiated at this key", fix)
        elif key.startswith("_") and key != TARGET:
            yield Problem(key_path, "Hydra's other instantiation keys are not allowed", "remove it")
        yield from _stray_targets(value, key_path)


def _adapter(plain: dict[str, Any]) -> list[Problem]:
    adapter = plain.get("adapter", {})
    wanted = "a PEFT config class, such as peft.LoraConfig"
    found, problems = resolve(adapter.get(TARGET), "adapter._target_", derives(PeftConfig), wanted)
    if found is None:
        return problems
    return [*problems, *adapter_problems(found, adapter, plain.get("trainer", {})), *start_problems(found, plain)]


def _quantization(plain: dict[str, Any]) -> list[Problem]:
    quantization = plain.get("quantization", {})
    wanted = "a transformers quantisation config, such as transformers.BitsAndBytesConfig"
    kind = derives(QuantizationConfigMixin)
    found, problems = resolve(quantization.get(TARGET), "quantization._target_", kind, wanted)
    if found:
        problems += quantization_problems(found, quantization, plain.get("adapter", {}), plain.get("trainer", {}))
    return problems


def _optimizer(plain: dict[str, Any]) -> list[Problem]:
    optimizer = plain.get("optimizer", {})
    wanted = "a torch.optim.Optimizer class, such as torch.optim.AdamW"
    found, problems = resolve(optimizer.get(TARGET), "optimizer._target_", derives(Optimizer), wanted)
    if found is None:
        return problems
    if refusal := class_refusal(found):  # if the class can't be used, its arguments are not checked
        return [Problem("optimizer._target_", refusal)]
    trainer = plain.get("trainer", {})
    if issubclass(found, (PairedOptimizer, ScheduleFree)) and (trainer.get("fsdp") or trainer.get("deepspeed")):
        problems.append(Problem("optimizer._target_", f"{found.__name__} {NEEDS_WHOLE}"))
    elif trainer.get("deepspeed") and (refusal := joined_tensors_refusal(found, _arguments(optimizer))):
        problems.append(Problem("optimizer._target_", refusal, "use optimizer=adamw, or trainer=fsdp2"))
    arguments = _arguments(optimizer)
    try:
        problems += [Problem("optimizer", text) for text in optimizer_problems(found, arguments)]
    except Exception as error:  # a class may raise any type of error for a combination of values
        return [Problem("optimizer", f"{found.__name__}: {first_line(error)}")]
    if not problems and not issubclass(found, (PairedOptimizer, ScheduleFree)):  # these need pairs, or their own mode
        refusal = ignored_rates(found, arguments)
        problems += [Problem("optimizer._target_", refusal, "use the group's rate: group['lr']")] if refusal else []
    return problems


def _scheduler(plain: dict[str, Any]) -> list[Problem]:
    """Check that the schedule accepts its arguments and keeps the ratio of two groups."""
    scheduler = plain.get("scheduler", {})
    wanted = "a torch.optim.lr_scheduler class, a transformers.get_..._schedule, or a function annotated -> LRScheduler"
    found, problems = resolve(scheduler.get(TARGET), "scheduler._target_", makes_schedule, wanted, "LRScheduler")
    if found is None:
        return problems
    stand_in, arguments = _stand_in_optimizer(plain), _arguments(scheduler)
    max_steps = plain.get("trainer", {}).get("max_steps")
    known = max_steps if isinstance(max_steps, int) and max_steps > 0 else None
    try:
        if known:
            fill_arguments(found, known, arguments)
        steps, arguments = _shortened(known, arguments)
        build_schedule(found, stand_in, num_training_steps=steps, kwargs=arguments)
        if _is_schedule_free(plain) and falls(found, stand_in, num_training_steps=steps, kwargs=arguments):
            return [Problem("scheduler", NOT_CONSTANT)]
    except UserError as error:
        return [Problem("scheduler", str(error))]
    except Exception as error:  # a schedule may raise any type of error, too
        return [Problem("scheduler", f"{scheduler[TARGET]}: {first_line(error)}")]
    return []


def _stand_in_optimizer(plain: dict[str, Any]) -> Optimizer:
    """Return an optimizer with two groups, with the config's rate as its default."""
    lr = plain.get("optimizer", {}).get("lr")
    if not isinstance(lr, (int, float)) or isinstance(lr, bool) or not 0 < lr < math.inf:
        lr = 1.0  # the rate is wrong or not known yet; a schedule's last rate is then compared with a high one
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate, "name": name}
        for name, rate in (("A", lr), ("B", 8 * lr))
    ]
    return torch.optim.AdamW(groups, lr=lr)


def _shortened(steps: int | None, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return a number of steps for a dry run, and arguments with phases shortened as the run is.

    `steps` is the run's number of steps, if it is known.
    """
    phases: dict[str, Any] = {key: arguments.get(key) for key in ("num_warmup_steps", "num_decay_steps")}
    counts = {key: int(value) for key, value in phases.items() if _is_whole(value) and value > 0}
    # At least a hundred steps, because fewer don't show the schedule's shape
    length = steps or max(100, sum(counts.values()) + 1)
    shown = min(length, 1000)  # more take long
    return shown, {**arguments, **{key: max(1, value * shown // length) for key, value in counts.items()}}


def _is_whole(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _average(plain: dict[str, Any]) -> list[Problem]:
    """Check that the adapter and the optimizer can train with an average of the weights."""
    if plain.get("trainer", {}).get("ema") is None:
        return []
    if _is_schedule_free(plain):
        return [Problem("trainer.ema", "a schedule-free optimizer already averages the weights", "set it to null")]
    adapter = resolve(plain.get("adapter", {}).get(TARGET), "", derives(PeftConfig), "")[0]
    if adapter is not None and schedule_of(adapter):
        what = f"{adapter.__name__} sets weights to zero while it trains, and an average doesn't keep them at zero"
        return [Problem("trainer.ema", what, "set it to null, or use adapter=lora")]
    return []


def _is_schedule_free(plain: dict[str, Any]) -> bool:
    return resolve(plain.get("optimizer", {}).get(TARGET), "", derives(ScheduleFree), "")[0] is not None


def _data(plain: dict[str, Any]) -> list[Problem]:
    data = plain.get("data", {})
    annotation = "datasets.DatasetDict"
    wanted = f"a function annotated -> {annotation}"
    found, problems = resolve(data.get(TARGET), "data._target_", returns_rows, wanted, annotation)
    return problems + (argument_problems(found, _arguments(loader_arguments(data)), "data") if found else [])


def _logger(plain: dict[str, Any]) -> list[Problem]:
    logger = plain.get("logger", {})
    home = f"{Tracker.__module__}.{Tracker.__qualname__}"
    wanted = f"a class derived from {home}; the options of the logger group have examples"
    found, problems = resolve(logger.get(TARGET), "logger._target_", derives(Tracker), wanted)
    if found is None:
        return problems
    arguments = _arguments(logger)
    return argument_problems(found, arguments, "logger") or [
        Problem("logger", text) for text in found.problems(**arguments)
    ]


def _rules(plain: dict[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    for name in ("rules", "extra_rules"):
        try:
            parse_rules(plain.get("loraplus", {}).get(name) or {}, where=f"loraplus.{name}")
        except ConfigErrors as error:
            problems += error.problems
    return problems


def _arguments(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != TARGET}
