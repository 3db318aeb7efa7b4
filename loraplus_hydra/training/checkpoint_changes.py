"""Comparison of optimizer, groups and schedule between a run and a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.checkpoint_state import GroupState, RunState, ScheduleState
from loraplus_hydra.loraplus.schedule_free import RUNNING_VALUES
from loraplus_hydra.loraplus.settings import LoraPlus

# Entries of a torch parameter group that are not settings.
_NOT_SETTINGS = ("params", "param_names", "name", "lr", "initial_lr", *RUNNING_VALUES)


def describe_training(settings: LoraPlus, groups: Mapping[str, Mapping[str, Any]], max_steps: int) -> dict[str, Any]:
    """Return the fields of RunState about optimizer, groups and schedule."""
    return {
        "optimizer": full_name(settings.optimizer_class),
        "groups": {
            name: GroupState(list(group["param_names"]), _through_json(_settings(group)))
            for name, group in groups.items()
        },
        "schedule": ScheduleState(full_name(settings.schedule), _through_json(settings.schedule_arguments)),
        "max_steps": max_steps,
    }


def differences(then: RunState, now: RunState) -> list[str]:
    """Return a text for each change of the groups' settings or the schedule."""
    changes = []
    for name, group in now.groups.items():
        old, new = then.groups[name].settings, group.settings
        changes += [
            f"{name}: {key} {old.get(key)} -> {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    if then.schedule != now.schedule:
        changes.append(f"schedule: {_schedule_text(then.schedule)} -> {_schedule_text(now.schedule)}")
    if then.max_steps != now.max_steps:
        changes.append(f"steps: {then.max_steps} -> {now.max_steps}")
    return changes


def refuse_other_groups(then: RunState, optimizer: str, groups: Mapping[str, list[str]]) -> None:
    """Raise UserError if the optimizer's class or a group's tensors differ from the checkpoint's.

    `groups` maps a group's name to its tensors' names.
    """
    changes = [] if then.optimizer == optimizer else [f"the optimizer was {then.optimizer} and is now {optimizer}"]
    changes += _group_changes(then.groups, groups)
    if changes:
        raise UserError(
            f"can't resume from the checkpoint: {'; '.join(changes)}. Rates, weight decay and steps may change, but "
            "the optimizer's class and the groups must not (adapter.path trains an adapter further with a new "
            "optimizer)"
        )


def _group_changes(then: Mapping[str, GroupState], groups: Mapping[str, list[str]]) -> list[str]:
    changes = []
    old = {name: group.tensors for name, group in then.items()}
    for name in dict.fromkeys([*old, *groups]):
        if name not in groups:
            changes.append(f"group {name} ({len(old[name])} tensors) no longer exists")
        elif name not in old:
            changes.append(f"group {name} ({len(groups[name])} tensors) is new")
        elif old[name] != groups[name]:
            other = sorted(set(old[name]) ^ set(groups[name]))
            changes.append(f"group {name} has other tensors" + (f", such as {other[0]}" if other else " (their order)"))
    # A tensor's optimizer state is found by its position, so the order must be the same, too.
    if not changes and list(old) != list(groups):
        changes.append(f"the groups' order was {', '.join(old)} and is now {', '.join(groups)}")
    return changes


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
    return {"lr": group.get("initial_lr", group["lr"]), **settings}


def _through_json(value: Mapping[str, Any]) -> Any:
    """Return a value converted to JSON and back, for comparison with a checkpoint's value."""
    return json.loads(json.dumps(value, default=str))


def _schedule_text(schedule: ScheduleState) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in schedule.arguments.items())
    return f"{schedule.is_.rpartition('.')[2]}({arguments})"


def full_name(thing: Any) -> str:
    """Return the module and name of a class or function."""
    return f"{thing.__module__}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
