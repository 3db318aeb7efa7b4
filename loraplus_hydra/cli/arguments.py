"""The words of a command line, converted for Hydra: command, flags and overrides."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.config.hydra_job import quoted
from loraplus_hydra.errors import ConfigErrors, Problem, nearest

# Flags of Hydra whose value is the next word.
_WITH_VALUE = frozenset(
    (
        *("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn"),
        *("--config-dir", "-cd", "--experimental-rerun"),
    )
)
_COMPLETION = re.compile("(install|uninstall|query)=(bash|zsh|fish)")
_NUMBER = re.compile(r"-[\d.][\de.+-]*")
_FIX = "--help and --hydra-help list the flags"


def flags_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words into flags with their values, and overrides.

    argparse needs all overrides in one sequence.
    """
    flags: list[str] = []
    overrides: list[str] = []
    is_value = False  # True if the word is the previous flag's value
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word in ("--info", "-i") and (following.startswith("-") or "=" in following or not following):
            # The meaning of --info without a value; otherwise argparse would read an override as its value
            word = "--info=all"
        (flags if word.startswith("-") or is_value else overrides).append(word)
        is_value = not is_value and word in _WITH_VALUE
    return flags, overrides


def refuse_wrong_flags(words: list[str], own: Iterable[str]) -> list[Problem]:
    """Raise ConfigErrors for invalid values of flags, and return a Problem for each unknown flag.

    `own` are the command's flags. Hydra's own parser would print its usage and end the program with status 2.
    """
    flags, overrides = flags_and_overrides([word for word in words if _own_flag(word, own) is None])
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    given, unknown = parser.parse_known_args([*overrides, *flags])
    known = [*parser._option_string_actions, *(f"--{name}" for name in own)]
    problems = [Problem(word, f"there is no such flag{nearest(word, known)}", _FIX) for word in unknown]
    if wrong := list(_value_problems(given)):
        raise ConfigErrors([*problems, *wrong])
    return problems


def with_values(problems: list[Problem], words: list[str]) -> tuple[list[tuple[Problem, str, str]], list[str]]:
    """Return (Problem, name, value) for each unknown flag, and all other words.

    The value may be the next word, as in `--lr 1e-4`. Without a value, it is true.
    """
    found = []
    others = list(words)
    for problem in problems:
        if problem.key not in others:  # a negative number, which was the value of the flag before
            continue
        place = others.index(problem.key)
        name, is_given, value = others.pop(place).lstrip("-").partition("=")
        following = others[place] if place < len(others) else "-"
        if not is_given and (_NUMBER.fullmatch(following) or not (following.startswith("-") or "=" in following)):
            value = others.pop(place)
        found.append((problem, name, value or "true"))
    return found, others


def _refuse(message: str) -> NoReturn:
    found = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
    key, what = (found[1], found[2]) if found else ("flags", message)
    raise ConfigErrors([Problem(key, what, _FIX)])


def _value_problems(given: Namespace) -> Iterator[Problem]:
    if given.experimental_rerun is not None:
        yield Problem("--experimental-rerun", "reads a pickle, which can run code", "use `resume RUN`")
    if given.resolve and given.cfg is None and given.info is None:
        yield Problem("--resolve", "needs --cfg", "for example: --cfg job --resolve")
    if given.config_dir is not None and not os.path.isdir(given.config_dir):  # noqa: PTH112
        yield Problem("--config-dir", f"there is no folder '{given.config_dir}'", "give a folder with your YAML files")
    if given.config_path is not None and not (os.path.isabs(given.config_path) or "://" in given.config_path):  # noqa: PTH117
        fix = "give the whole path; or add a folder of yours to this program's own: --config-dir DIR"
        yield Problem("--config-path", f"Hydra doesn't look for '{given.config_path}' in the current folder", fix)
    if given.shell_completion and not any(_COMPLETION.fullmatch(word) for word in given.overrides):
        fix = 'for example: eval "$(loraplus-hydra -sc install=bash)"'
        yield Problem("--shell-completion", "has no effect without install, uninstall or query", fix)


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the command and the words after it. Without a command, the command is `train`."""
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    return "train", arguments


def hydra_arguments(name: str, arguments: list[str]) -> list[str]:
    """Return a command's arguments for Hydra.

    The word after the command becomes an override, and the command's flags become arguments of the callback BeforeRun.
    """
    command = COMMANDS[name]
    rest = list(arguments)
    extra = []
    if command.search is not None:
        extra.append(f"hparams_search={command.search}")
    elif name != "train":
        extra.append(f"hydra.callbacks.before_run.command={name}")
    if command.positional and rest and _is_bare(rest[0]):
        extra.append(f"{command.positional}={quoted(rest.pop(0))}")
    given = [_own_flag(argument, command.flags) for argument in rest]
    rest = [argument for argument, flag in zip(rest, given, strict=True) if flag is None]
    if flags := [flag for flag in given if flag]:
        extra.append(f"hydra.callbacks.before_run.flags=[{','.join(flags)}]")
    as_typed = (*command.verbatim, *([command.positional] if command.positional else []))
    rest = [_verbatim(argument, as_typed) for argument in rest]
    # With `+`, because the command's own YAML can't list the keys of a stored run's config.
    rest = [f"++{text}" if text.split(".")[0] in command.changes and "." in text else text for text in rest]
    own_of_hydra, overrides = flags_and_overrides(rest)
    config = [f"--config-name={command.config}"] if command.config != "config" else []
    return [*config, *own_of_hydra, *extra, *overrides]


def _own_flag(word: str, own: Iterable[str]) -> str | None:
    """Return the command's own flag that a word sets; None for any other word.

    It is empty if the flag is set to false.
    """
    name, _, value = word.removeprefix("--").partition("=")
    if name not in own or value.lower() not in ("", "true", "false"):
        return None
    return "" if value.lower() == "false" else name


def _is_bare(word: str) -> bool:
    """Return True for a word that is neither a flag nor an override.

    A folder's name may contain a `=`.
    """
    return not word.startswith("-") and ("=" not in word or os.path.isdir(word))  # noqa: PTH112 - False for names that are too long


def _verbatim(argument: str, keys: tuple[str, ...]) -> str:
    """Return `text=...` with a quoted value, unless the value is already quoted or null."""
    key, found, value = argument.partition("=")
    if not found or key not in keys or value == "null" or value[:1] in ("'", '"'):
        return argument
    return f"{key}={quoted(value)}"
