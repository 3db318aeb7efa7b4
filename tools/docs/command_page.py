"""The page of the reference on the commands: usage, flags and keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.schema import SCHEMAS
from loraplus_hydra.config.types import field_types
from tools.docs.config_pages import Place, option_parts
from tools.docs.markdown import code, prose
from tools.docs.yaml_keys import read_option

_ABOUT = """# Commands, flags and keys

The first word is a command; without one it is `train`. All other words are overrides of the config, in Hydra's grammar:
`group=option`, `key=value`, `+key=value`. [Commands](commands.md) explains how to use them."""
# Hydra's own flags that the pages use; `--help` lists all of them.
_HYDRA = {
    "--cfg job": "print the config, and do nothing else",
    "--help": "list commands, groups, options and flags",
    "--hydra-help": "Hydra's own help",
    "--info defaults": "print the file of each part of the config",
    "--multirun": "run a job for each combination of values; short: `-m`",
    "--config-dir": "add a folder with YAML files of your own",
    "--config-name": "compose another YAML file than the command's",
    "--resolve": "with `--cfg`, resolve interpolations",
    "--shell-completion": "install or remove the shell's completion; short: `-sc`",
    "--version": "print Hydra's version",
}


def command_page(conf: Path) -> str:
    """Return the page as Markdown."""
    parts = [_ABOUT]
    for command in COMMANDS.values():
        parts += [f"## {command.name}", *_parts(command, conf)]
    flags = "\n".join(f"- {code(flag)}: {about}" for flag, about in _HYDRA.items())
    parts += ["## Flags of every command", flags]
    return "\n\n".join(parts) + "\n"


def _parts(command: Command, conf: Path) -> Iterator[str]:
    yield prose(f"{command.summary[0].upper()}{command.summary[1:]}.", "reference")
    usage = f"python -m loraplus_hydra {command.name} {command.usage}".rstrip()
    yield f"```text\n{usage}\n```"
    if command.flags:
        yield "Flags: " + ", ".join(code(f"--{flag}") for flag in command.flags)
    if command.config != "config":
        schema = field_types(SCHEMAS[f"{command.config}_schema"])
        yield from option_parts(read_option(conf / f"{command.config}.yaml"), Place("reference", "", schema))
    elif command.search:
        yield f"Keys: those of a run, and of [{command.search}](groups/hparams_search.md#{command.search})."
    else:
        yield "Keys: those of [a run](keys.md)."
