"""Checks of the task: classes, keys, the Trainer's arguments, and the task module's own checks."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.training_args import trainer_log_levels

from loraplus_hydra.check.deepspeed import deepspeed_problems
from loraplus_hydra.check.keys import NOT_SET
from loraplus_hydra.check.kinds import TARGET, derives, is_auto_class, resolve, returns
from loraplus_hydra.check.signatures import argument_problems, documented_value_problems
from loraplus_hydra.check.values import MASTERS
from loraplus_hydra.config.schema import NOT_TRAINING_ARGUMENTS, TaskConfig
from loraplus_hydra.config.synonyms import own_name
from loraplus_hydra.errors import Problem, first_line, nearest
from loraplus_hydra.io.processes import world_size
from loraplus_hydra.tasks.examples import BASE, own_arguments

_PLACES: dict[str, tuple[Callable[[Any], bool], str]] = {
    TARGET: (derives(Trainer), "a transformers.Trainer class, such as trl.SFTTrainer"),
    "args_class": (derives(TrainingArguments), "a transformers.TrainingArguments class"),
    "auto_class": (is_auto_class, "one of transformers' auto classes, such as transformers.AutoModelForCausalLM"),
    "examples": (returns("Examples"), "a function annotated -> Examples, such as loraplus_hydra.tasks.sft.examples"),
}


def task_problems(plain: dict[str, Any]) -> list[Problem]:
    """Return the errors of the groups `task` and `trainer`."""
    task = plain.get("task", {})
    problems = _common_keys(task)
    found = {}
    for name, (kind, wanted) in _PLACES.items():
        path = task.get(name) if isinstance(task.get(name), str) else None
        found[name], more = resolve(path, f"task.{name}", kind, wanted, "Examples" if name == "examples" else "")
        problems += more
    if found["examples"] is not None:
        problems += _own_keys(found["examples"], task)
    if found["args_class"] is not None:
        problems += _trainer_arguments(found["args_class"], task, plain.get("trainer", {}))
    return problems or _own_rules(found["examples"], plain)


def _common_keys(task: dict[str, Any]) -> list[Problem]:
    """Check that all keys that every task has exist and have the right type."""
    names = [field.name for field in fields(TaskConfig)]
    missing = [name for name in names if name not in task]
    problems = [Problem(f"task.{name}", NOT_SET, f"set it: +task.{name}=...") for name in missing]
    return problems + argument_problems(TaskConfig, {name: task[name] for name in names if name in task}, "task")


def _own_keys(examples: Callable[..., Any], task: dict[str, Any]) -> list[Problem]:
    """Check a task's own keys against the parameters of its function."""
    # Rows, tokenizer, task and data, which may have any names
    first = tuple(inspect.signature(examples).parameters)[:4]
    common = [field.name for field in fields(TaskConfig)]
    return argument_problems(examples, own_arguments(task), "task", (*first, BASE), also_valid=common)


def _own_rules(examples: Callable[..., Any] | None, plain: dict[str, Any]) -> list[Problem]:
    """Return the Problems of `config_problems`, an optional function in the module of `examples`."""
    module = inspect.getmodule(examples)  # None if the function isn't set
    rules = vars(module).get("config_problems") if module is not None else None
    return list(rules(plain)) if rules is not None else []


def _trainer_arguments(arguments: type, task: dict[str, Any], trainer: dict[str, Any]) -> list[Problem]:
    trainer, own = _without(trainer, *NOT_TRAINING_ARGUMENTS), task.get("args") or {}
    problems = _misplaced(arguments, trainer, own)
    if isinstance(trainer.get("activation_checkpointing_kwargs"), str):
        key = "trainer.activation_checkpointing_kwargs"
        problems.append(Problem(key, "text is not a mapping of arguments", "for example {use_reentrant: false}"))
    if trainer.get("fsdp") and world_size() == 1:
        fix = "start it with torchrun --nproc_per_node N -m loraplus_hydra ..., or use trainer=default"
        problems.append(Problem("trainer.fsdp", "FSDP needs several processes, but there is only one", fix))
    problems += (
        deepspeed_problems(trainer) + _log_levels(trainer) + documented_value_problems(arguments, own, "task.args")
    )
    return problems or _constructed(arguments, {**trainer, **own})


def _log_levels(trainer: dict[str, Any]) -> list[Problem]:
    """Check names that transformers checks only when the Trainer is made."""
    return [
        Problem(f"trainer.{key}", f"there is no level '{trainer[key]}'", f"use one of {', '.join(trainer_log_levels)}")
        for key in ("log_level", "log_level_replica")
        if isinstance(trainer.get(key), str) and trainer[key] not in trainer_log_levels  # types are checked elsewhere
    ]


def _misplaced(arguments: type, trainer: dict[str, Any], own: dict[str, Any]) -> list[Problem]:
    """Return Problems for fields with a wrong name, type or group.

    Fields that all Trainers have belong to `trainer`, other fields to `task.args`.
    """
    common = {field.name for field in fields(TrainingArguments)} - set(MASTERS)
    special = {field.name for field in fields(arguments)} - common - set(MASTERS)  # type: ignore[arg-type]
    problems = []
    for place, group, valid, elsewhere, other in (
        ("trainer", trainer, common, special, "task.args"),
        ("task.args", own, special, common, "trainer"),
    ):
        for name in group:
            if name in elsewhere:
                problems.append(Problem(f"{place}.{name}", "belongs to another group", f"write {other}.{name}"))
            elif name not in valid and name not in MASTERS:
                hint = nearest(own_name(name, place), valid | elsewhere)
                problems.append(Problem(f"{place}.{name}", f"{arguments.__name__} has no such field{hint}"))
        # `fsdp` is annotated as text, but accepts true.
        known = {name: value for name, value in group.items() if name in valid and name != "fsdp"}
        problems += argument_problems(arguments, known, place)
    return problems


def _constructed(arguments: type, values: dict[str, Any]) -> list[Problem]:
    """Instantiate the arguments' class and return its error as a Problem."""
    try:
        with _same_environment():
            arguments(output_dir=".", report_to="none", **_without(values, *MASTERS))
    except (OSError, json.JSONDecodeError):  # machine_problems reports a file of settings that can't be read
        return []
    except (ValueError, TypeError, ImportError) as error:
        return [Problem("trainer", first_line(error))]
    return []


@contextmanager
def _same_environment() -> Iterator[None]:
    """Restore the environment's variables. The arguments' class sets some, such as that DeepSpeed is used."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _without(group: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}
