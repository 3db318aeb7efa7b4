"""`chat`: talk with a finished run's adapter in the terminal."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.cli.commands.command import Command, range_problems
from loraplus_hydra.config.command_schemas import ChatConfig
from loraplus_hydra.errors import refuse
from loraplus_hydra.runs.finished import open_named_run
from loraplus_hydra.runs.stored_config import unnamed_run


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Answer the lines of stdin until it ends. Raises UserError."""
    refuse([*unnamed_run(config), *range_problems(config, ChatConfig)])
    run = open_named_run(config)
    from loraplus_hydra.runs.chat import Chat

    names = ("system", "max_new_tokens", "temperature", "top_p")
    Chat(run, **{name: config[name] for name in names}).talk()


COMMAND = Command(
    "chat",
    "talk with a finished run's adapter",
    main,
    usage="RUN",
    config="chat",
    positional="run",
    verbatim=("system",),
    changes=("model",),
)
