"""The commands, one light module each: its `COMMAND`, and a `main` that imports the rest when it runs."""

from __future__ import annotations

import importlib
import pkgutil

from loraplus_hydra.cli.commands.command import Command

_MODULES = [importlib.import_module(each.name) for each in pkgutil.iter_modules(__path__, prefix=f"{__name__}.")]
COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND for module in _MODULES if isinstance(getattr(module, "COMMAND", None), Command)
}


def commands_help() -> str:
    """Return a line for each command: its name, the words after it, and its summary."""
    words = {f"{command.name} {command.usage}": command.summary for command in COMMANDS.values()}
    width = max(map(len, words))
    return "\n".join(f"  {left:<{width}}  {summary}" for left, summary in words.items())
