"""Optimizer, groups by name and schedule, as a checkpoint keeps them: what has changed since, and what may not.

No torch: a Trainer's optimizer is asked for its groups alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loraplus_hydra.errors import UserError

# Of a torch parameter group: what isn't a setting.
_NOT_SETTINGS = ("params", "param_names", "name", "lr", "initial_lr")


def described(trainer: Any, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Optimizer, parameter groups by name and schedule of a Trainer, as JSON has them."""
    loraplus = trainer.loraplus
    told = {
        "optimizer": full_name(loraplus.optimizer_class),
        "groups": {
            name: {"tensors": list(group["param_names"]), "settings": _settings(group)}
            for name, group in groups.items()
        },
        "schedule": {"is": full_name(loraplus.schedule), "arguments": dict(loraplus.schedule_arguments)},
        "max_steps": trainer.state.max_steps,
    }
    plain: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return plain


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the groups' settings and of the schedule has changed, in words."""
    said = []
    for name, group in now["groups"].items():
        old, new = then["groups"][name]["settings"], group["settings"]
        said += [
            f"{name}: {key} {old.get(key)} -> {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    if then["schedule"] != now["schedule"]:
        said.append(f"schedule: {_in_words(then['schedule'])} -> {_in_words(now['schedule'])}")
    if then["max_steps"] != now["max_steps"]:
        said.append(f"steps: {then['max_steps']} -> {now['max_steps']}")
    return said


def refuse_other_groups(then: Mapping[str, Any], optimizer: str, groups: Mapping[str, list[str]]) -> None:
    """Raise UserError when the optimizer's class, or which tensors are in which group, isn't the checkpoint's.

    `groups` maps a group's name to its tensors' names. Their optimizer state goes by the tensor's place in its group.
    """
    said = []
    if then["optimizer"] != optimizer:
        said.append(f"the optimizer was {then['optimizer']} and is now {optimizer}")
    old = {name: group["tensors"] for name, group in then["groups"].items()}
    for name in [*old, *(name for name in groups if name not in old)]:
        if name not in groups:
            said.append(f"group {name} ({len(old[name])} tensors) is gone")
        elif name not in old:
            said.append(f"group {name} ({len(groups[name])} tensors) is new")
        elif old[name] != groups[name]:
            other = sorted(set(old[name]) ^ set(groups[name]))
            said.append(f"group {name} has other tensors" + (f", such as {other[0]}" if other else " (their order)"))
    if not said and list(old) != list(groups):
        said.append(f"the groups were in the order {', '.join(old)} and are in {', '.join(groups)}")
    if said:
        raise UserError(
            f"the checkpoint can't be gone on from: {'; '.join(said)}. Rates, weight decay and steps may change; the "
            "optimizer's class and the groups may not (adapter.path trains on an adapter with a new optimizer)"
        )


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
    return {"lr": group.get("initial_lr", group["lr"]), **settings}


def _in_words(schedule: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in schedule["arguments"].items())
    return f"{schedule['is'].rpartition('.')[2]}({arguments})"


def full_name(thing: Any) -> str:
    """A class or function by its module and name."""
    return f"{thing.__module__}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
