"""The JSON files of a checkpoint: read only if they are as a run writes them, since they may be somebody else's."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.read import read_json

STATE = "run_state.json"  # what the Trainer's own files lack: see resuming.py
TRAINER_STATE = "trainer_state.json"  # as the Trainer names it


def run_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's run_state.json. Raises ValueError unless it is as `resuming.CheckpointKeeper` writes it."""
    state: dict[str, Any] = read_json(folder / STATE)
    step: Any = state.get("step")
    right = {
        "step": _whole(step, 1),
        "seconds": _number(state.get("seconds"), 0),
        "metrics_bytes": _whole(state.get("metrics_bytes"), 0),
        "window": _whole(step, 1) and _is_window(state.get("window"), step),
        "optimizer": isinstance(state.get("optimizer"), str),
        "groups": _are_groups(state.get("groups")),
        "schedule": _is_schedule(state.get("schedule")),
        "max_steps": _whole(state.get("max_steps"), 1),
    }
    _refuse_others(STATE, right)
    return state


def write_run_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint's run_state.json."""
    write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def _is_window(window: Any, step: int) -> bool:
    if not isinstance(window, dict):
        return False
    losses, trl = window.get("losses"), window.get("trl")
    return (
        isinstance(losses, list)
        and len(losses) > 0
        and all(_number(loss) for loss in losses)
        and _whole(window.get("since_step"), 0)
        and window["since_step"] <= step
        and _number(window.get("total"))
        and isinstance(trl, dict)
        and all(_is_number(held) or _are_metrics(held) for held in trl.values())
    )


def _are_metrics(held: Any) -> bool:
    """Lists of numbers by name; TRL has NaN among them where a batch had nothing to measure."""
    lists = held.values() if isinstance(held, dict) else [None]
    return all(isinstance(values, list) and all(_is_number(value) for value in values) for values in lists)


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, dict) and all(
        isinstance(group, dict)
        and isinstance(group.get("settings"), dict)
        and isinstance(group.get("tensors"), list)
        and all(isinstance(name, str) for name in group["tensors"])
        for group in groups.values()
    )


def _is_schedule(schedule: Any) -> bool:
    return (
        isinstance(schedule, dict)
        and isinstance(schedule.get("is"), str)
        and isinstance(schedule.get("arguments"), dict)
    )


def trainer_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's trainer_state.json. Raises ValueError unless a TrainerState can be made of it and gone on with."""
    from transformers import TrainerState  # heavy

    state: dict[str, Any] = read_json(folder / TRAINER_STATE)
    if unknown := sorted(state.keys() - {field.name for field in fields(TrainerState)}):
        raise ValueError(f"its {TRAINER_STATE} has a key that this transformers doesn't know: {unknown[0]}")
    step, history, callbacks = (state.get(name) for name in ("global_step", "log_history", "stateful_callbacks"))
    right = {
        "global_step": _whole(step, 1),
        "epoch": _number(state.get("epoch"), 0),
        "max_steps": _whole(state.get("max_steps"), 1),
        "num_train_epochs": _whole(state.get("num_train_epochs"), 0),
        "num_input_tokens_seen": _number(state.get("num_input_tokens_seen"), 0),
        "total_flos": _number(state.get("total_flos"), 0),
        "log_history": isinstance(history, list)
        and all(isinstance(entry, dict) and _whole(entry.get("step"), 0) for entry in history),
        "stateful_callbacks": isinstance(callbacks, dict) and all(_is_callback(kept) for kept in callbacks.values()),
    }
    for name in ("logging_steps", "eval_steps", "save_steps"):
        right[name] = state.get(name) is None or _number(state[name], 0)
    for name, least in (("train_batch_size", 1), ("best_global_step", 0)):
        right[name] = state.get(name) is None or _whole(state[name], least)
    right["best_metric"] = state.get("best_metric") is None or _is_number(state["best_metric"])
    right["best_model_checkpoint"] = isinstance(state.get("best_model_checkpoint"), (str, type(None)))
    _refuse_others(TRAINER_STATE, right)
    return state


def _is_callback(kept: Any) -> bool:
    """What a callback, or several of one class, have kept: arguments and attributes by name."""
    each = kept if isinstance(kept, list) else [kept]
    return all(
        isinstance(one, dict)
        and isinstance(one.get("args"), dict)
        and isinstance(one.get("attributes"), dict)
        and _whole(one["attributes"].get("early_stopping_patience_counter", 0), 0)
        for one in each
    )


def _refuse_others(name: str, right: dict[str, bool]) -> None:
    if wrong := [key for key, holds in right.items() if not holds]:
        raise ValueError(f"its {name} isn't as it was written: {', '.join(wrong)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, least: float = -math.inf) -> bool:
    """Whether `value` is a finite number from `least` on."""
    return _is_number(value) and abs(value) <= sys.float_info.max and value >= least


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
