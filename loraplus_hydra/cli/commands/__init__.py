"""The commands, one module each, with a `COMMAND` and a `main`.

Every module with a `COMMAND` is found. `main` imports what it needs when it runs, so that `--help` stays fast.
"""

from __future__ import annotations

import importlib
import pkgutil

from loraplus_hydra.cli.commands.command import Command

_MODULES = [importlib.import_module(each.name) for each in pkgutil.iter_modules(__path__, prefix=f"{__name__}.")]
COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND for module in _MODULES if isinstance(getattr(module, "COMMAND", None), Command)
}


def commands_help() -> str:
    """Return a line for each command: name, usage and summary."""
    words = {f"{command.name} {command.usage}": command.summary for command in COMMANDS.values()}
    width = max(map(len, words))
    return "\n".join(f"  {left:<{width}}  {summary}" for left, summary in words.items())
