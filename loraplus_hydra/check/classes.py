"""What the config names by a dotted path: it is there, of the kind that its place expects, and takes its arguments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from loraplus_hydra.check.keys import NOT_SET
from loraplus_hydra.check.kinds import (
    derives,
    is_auto_class,
    is_peft_settings,
    makes_schedule,
    returns_examples,
    returns_rows,
)
from loraplus_hydra.check.signatures import argument_problems
from loraplus_hydra.check.values import MASTERS
from loraplus_hydra.config.schema import NOT_TRAINING_ARGUMENTS, TaskConfig
from loraplus_hydra.config.targets import locate
from loraplus_hydra.data.rows import loader_arguments
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line, nearest
from loraplus_hydra.io.processes import world_size
from loraplus_hydra.tasks.examples import own_arguments

TARGET = "_target_"
# Where a `_target_` may stand. Inside `adapter` further ones may, for PEFT's nested configs.
PLACES = ("quantization", "adapter", "optimizer", "scheduler", "task", "data", "logger")


def class_problems(plain: dict[str, Any]) -> list[Problem]:
    """Problems of every place of the config that names a class or a function."""
    problems = list(_stray_targets(plain, ""))
    problems += _adapter(plain.get("adapter", {}), plain.get("trainer", {}))
    problems += _quantization(plain.get("quantization", {}), plain.get("adapter", {}), plain.get("trainer", {}))
    problems += _optimizer(plain.get("optimizer", {}))
    problems += _scheduler(plain.get("scheduler", {}), _steps(plain.get("trainer", {})))
    problems += _task(plain)
    problems += _data(plain.get("data", {}))
    problems += _logger(plain.get("logger") or {})
    problems += _rules(plain)
    return problems


def _stray_targets(node: Any, path: str) -> Iterator[Problem]:
    """A `_target_` anywhere else would never be called, or be called where nobody expects it."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _stray_targets(item, f"{path}.{index}")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        key_path = f"{path}.{key}" if path else key
        if key == TARGET and path.startswith("adapter.") and str(value).startswith("peft."):
            wanted = "one of PEFT's settings, such as peft.LoftQConfig"
            yield from _resolve(value, key_path, is_peft_settings, wanted)[1]
        elif key == TARGET and path not in PLACES:
            yield Problem(
                key_path,
                f"nothing is built here, so '{value}' has no place",
                f"remove it; {TARGET} belongs to {', '.join(PLACES)}",
            )
        elif key.startswith("_") and key != TARGET:
            yield Problem(key_path, "Hydra's other instantiation keys have no place here", "remove it")
        yield from _stray_targets(value, key_path)


def _resolve(path: Any, key: str, kind: Callable[[Any], bool], wanted: str) -> tuple[Any, list[Problem]]:
    """The object at a dotted path if it is of the `kind` that its place wants."""
    if path is None:
        return None, []  # missing: told already
    try:
        found = locate(path)
    except UserError as error:
        return None, [Problem(key, str(error), f"name {wanted}")]
    if not kind(found):
        return None, [Problem(key, f"'{path}' is {_what(found)}", f"it must be {wanted}")]
    return found, []


def _what(found: Any) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}"
    return (
        f"the function {found.__name__}"
        if callable(found) and hasattr(found, "__name__")
        else f"a {type(found).__name__}"
    )


def _steps(trainer: dict[str, Any]) -> int:
    """As many steps as the run is told to take, or enough to see the shape of a schedule."""
    steps = trainer.get("max_steps")
    return min(steps, 1000) if isinstance(steps, int) and steps > 0 else 100


def _without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}


def _adapter(adapter: dict[str, Any], trainer: dict[str, Any]) -> list[Problem]:
    from peft import PeftConfig

    from loraplus_hydra.check.adapter import adapter_problems

    if adapter.get(TARGET) is None and "path" in adapter:
        return []  # the adapter's own config says
    found, problems = _resolve(
        adapter.get(TARGET), "adapter._target_", derives(PeftConfig), "a PEFT config class, such as peft.LoraConfig"
    )
    return problems + (adapter_problems(found, adapter, trainer) if found else [])


def _quantization(quantization: dict[str, Any], adapter: dict[str, Any], trainer: dict[str, Any]) -> list[Problem]:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from loraplus_hydra.check.adapter import quantization_problems

    wanted = "a transformers quantisation config, such as transformers.BitsAndBytesConfig"
    found, problems = _resolve(
        quantization.get(TARGET), "quantization._target_", derives(QuantizationConfigMixin), wanted
    )
    return problems + (quantization_problems(found, quantization, adapter, trainer) if found else [])


def _optimizer(optimizer: dict[str, Any]) -> list[Problem]:
    from torch.optim import Optimizer

    from loraplus_hydra.loraplus.optimizer import optimizer_problems

    wanted = "a torch.optim.Optimizer class, such as torch.optim.AdamW"
    found, problems = _resolve(optimizer.get(TARGET), "optimizer._target_", derives(Optimizer), wanted)
    if found is None:
        return problems
    try:
        told = optimizer_problems(found, _without(optimizer, TARGET))
    except Exception as error:  # what a class says of values that contradict each other is its own affair
        return [Problem("optimizer", f"{found.__name__}: {first_line(error)}")]
    unfit = [text for text in told if "can't be used" in text]  # then its arguments don't matter
    return [Problem("optimizer._target_" if unfit else "optimizer", text) for text in unfit or told]


def _scheduler(scheduler: dict[str, Any], steps: int) -> list[Problem]:
    """Try the schedule on two groups of different rates: it takes its arguments and keeps their ratio."""
    found, problems = _resolve(
        scheduler.get(TARGET),
        "scheduler._target_",
        makes_schedule,
        "a torch.optim.lr_scheduler class, a transformers.get_..._schedule, or a function that says -> LRScheduler",
    )
    if found is None:
        return problems
    import torch

    from loraplus_hydra.loraplus.schedule import build_schedule

    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, "name": name}
        for lr, name in ((1e-4, "A"), (8e-4, "B"))
    ]
    try:
        build_schedule(found, torch.optim.AdamW(groups), num_training_steps=steps, kwargs=_without(scheduler, TARGET))
    except UserError as error:
        problems.append(Problem("scheduler", str(error)))
    except Exception as error:  # as with optimizers
        problems.append(Problem("scheduler", f"{scheduler[TARGET]}: {first_line(error)}"))
    return problems


def _task(plain: dict[str, Any]) -> list[Problem]:
    """Check what the task names, its keys, and the rules of its own module."""
    from transformers import Trainer, TrainingArguments

    places = {
        TARGET: (derives(Trainer), "a transformers.Trainer class, such as trl.SFTTrainer"),
        "args_class": (derives(TrainingArguments), "a transformers.TrainingArguments class"),
        "auto_class": (is_auto_class, "one of transformers' auto classes, such as transformers.AutoModelForCausalLM"),
        "examples": (
            returns_examples,
            "a function that says -> Examples, such as loraplus_hydra.tasks.sft.examples",
        ),
    }
    task = plain.get("task", {})
    problems = _common_task_keys(task)
    found = {}
    for name, (kind, wanted) in places.items():
        path = task.get(name)
        found[name], more = _resolve(path if isinstance(path, str) else None, f"task.{name}", kind, wanted)
        problems += more
    if found["examples"] is not None:
        problems += _example_arguments(found["examples"], task)
    if found["args_class"] is not None:
        problems += _trainer_arguments(found["args_class"], task, plain.get("trainer", {}))
    return problems or _rules_of_the_task(found["examples"], plain)


def _common_task_keys(task: dict[str, Any]) -> list[Problem]:
    """Check the keys that every task has: all are present, each of its type."""
    names = [field.name for field in fields(TaskConfig)]
    missing = [name for name in names if name not in task]
    problems = [Problem(f"task.{name}", NOT_SET, f"give it a value: +task.{name}=...") for name in missing]
    return problems + argument_problems(TaskConfig, {name: task[name] for name in names if name in task}, "task")


def _example_arguments(examples: Callable[..., Any], task: dict[str, Any]) -> list[Problem]:
    """Check a task's own keys against the parameters of its function."""
    supplied = tuple(inspect.signature(examples).parameters)[:4]  # rows, tokenizer, task, data, whatever their names
    valid = [field.name for field in fields(TaskConfig)]
    return argument_problems(examples, own_arguments(task), "task", supplied, also_valid=valid)


def _rules_of_the_task(examples: Callable[..., Any] | None, plain: dict[str, Any]) -> list[Problem]:
    """Ask the task's own module, which may have a function `config_problems` beside `examples`."""
    module = inspect.getmodule(examples)  # None for a function that isn't set
    rules = vars(module).get("config_problems") if module is not None else None
    return list(rules(plain)) if rules is not None else []


def _trainer_arguments(arguments: type, task: dict[str, Any], trainer: dict[str, Any]) -> list[Problem]:
    """Fields common to all Trainers stand under `trainer`, those of this one alone under `task.args`."""
    from transformers import TrainingArguments

    trainer = _without(trainer, *NOT_TRAINING_ARGUMENTS)  # ours
    common = {field.name for field in fields(TrainingArguments)} - set(MASTERS)
    own = {field.name for field in fields(arguments)} - common - set(MASTERS)  # type: ignore[arg-type]
    problems = []
    for place, group, here, there in (
        ("trainer", trainer, common, own),
        ("task.args", task.get("args") or {}, own, common),
    ):
        other = "task.args" if place == "trainer" else "trainer"
        for name in group:
            if name in there:
                problems.append(Problem(f"{place}.{name}", "belongs elsewhere", f"write {other}.{name}"))
            elif name not in here and name not in MASTERS:
                hint = nearest(name, here | there)
                problems.append(Problem(f"{place}.{name}", f"{arguments.__name__} has no such field{hint}"))
        # `fsdp` is annotated as text, and true is what it takes
        known = {name: value for name, value in group.items() if name in here and name != "fsdp"}
        problems += argument_problems(arguments, known, place)
    if isinstance(trainer.get("activation_checkpointing_kwargs"), str):
        key = "trainer.activation_checkpointing_kwargs"
        problems.append(Problem(key, "text is no mapping of arguments", "as in {use_reentrant: false}"))
    if trainer.get("fsdp") and world_size() == 1:
        fix = "start it with torchrun --nproc_per_node N -m loraplus_hydra ..., or use trainer=default"
        problems.append(Problem("trainer.fsdp", "FSDP needs several processes, and this is one", fix))
    if not problems:
        problems += _construction(arguments, {**trainer, **(task.get("args") or {})})
    return problems


def _construction(arguments: type, values: dict[str, Any]) -> list[Problem]:
    """What the arguments' class itself says of the values together."""
    try:
        arguments(output_dir=".", report_to="none", **_without(values, *MASTERS))
    except (OSError, json.JSONDecodeError):  # a file of settings that can't be read: told by machine_problems
        return []
    except (ValueError, TypeError, ImportError) as error:
        return [Problem("trainer", first_line(error))]
    return []


def _data(data: dict[str, Any]) -> list[Problem]:
    found, problems = _resolve(
        data.get(TARGET), "data._target_", returns_rows, "a function that says -> datasets.DatasetDict"
    )
    return problems + (argument_problems(found, _without(loader_arguments(data), TARGET), "data") if found else [])


def _logger(logger: dict[str, Any]) -> list[Problem]:
    from loraplus_hydra.training.trackers.tracker import Tracker

    wanted = (
        "a class derived from loraplus_hydra.training.trackers.tracker.Tracker, such as the logger group's options name"
    )
    found, problems = _resolve(logger.get(TARGET), "logger._target_", derives(Tracker), wanted)
    if found is None:
        return problems
    arguments = _without(logger, TARGET)
    problems += argument_problems(found, arguments, "logger")
    return problems or [Problem("logger", text) for text in found.problems(**arguments)]


def _rules(plain: dict[str, Any]) -> list[Problem]:
    from loraplus_hydra.loraplus.rules import parse_rules

    problems: list[Problem] = []
    for name in ("rules", "extra_rules"):
        try:
            parse_rules(plain.get("loraplus", {}).get(name) or {}, where=f"loraplus.{name}")
        except ConfigErrors as error:
            problems += error.problems
    return problems
