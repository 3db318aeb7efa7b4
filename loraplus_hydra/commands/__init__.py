"""The first words of the command line, one module each: `main(config, flags)` does what the word says.

`config` is the composed config of the command (a `run` for most), `flags` the `--name` words that it knows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A first word: what it does, and what may stand behind it."""

    does: str  # for --help
    config: str = "config"  # the YAML that it composes: `config` is a run
    positional: str | None = None  # the key that a bare word right behind it sets
    flags: tuple[str, ...] = ()  # `--name` words of its own


TRAIN = "train"
COMMANDS: dict[str, Command] = {
    TRAIN: Command("train one run (the word can be left out); -m trains one for each combination of values"),
    "inspect": Command(
        "show every trained tensor's role, rule, group and rate, and the memory; no weights are loaded (--tensors, --json)",
        flags=("tensors", "json"),
    ),
    "check": Command("say everything that is wrong with the config, train nothing"),
}
