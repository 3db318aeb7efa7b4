"""The flags on a command line: told from the overrides, and a wrong one told as any wrong input is.

Hydra's parser would print its usage and end with status 2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from loraplus_hydra.errors import ConfigErrors, Problem, nearest

# Those whose value is the next word.
_WITH_VALUE = frozenset(
    (
        *("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn"),
        *("--config-dir", "-cd", "--experimental-rerun"),
    )
)
_COMPLETION = re.compile("(install|uninstall|query)=(bash|zsh|fish)")
_FIX = "--help and --hydra-help list the flags"


def flags_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that are flags or a flag's value, and all others; argparse takes overrides in one row only."""
    flags: list[str] = []
    overrides: list[str] = []
    needing = False  # whether the word before needs this one as its value
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word in ("--info", "-i") and (following.startswith("-") or "=" in following or not following):
            word = "--info=all"  # what it means without a value; an override would be taken for one
        (flags if word.startswith("-") or needing else overrides).append(word)
        needing = not needing and word in _WITH_VALUE
    return flags, overrides


def refuse_wrong_flags(words: list[str], own: Iterable[str]) -> None:
    """Raise ConfigErrors for flags that Hydra doesn't know, or whose value it doesn't; `own` are the command's."""
    flags, overrides = flags_and_overrides([word for word in words if word.removeprefix("--") not in own])
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        found = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
        key, what = (found[1], found[2]) if found else ("flags", message)
        raise ConfigErrors([Problem(key, what, _FIX)])

    parser.error = refuse  # type: ignore[method-assign]
    given, unknown = parser.parse_known_args([*overrides, *flags])
    known = [*parser._option_string_actions, *(f"--{name}" for name in own)]
    problems = [Problem(word, f"there is no such flag{nearest(word, known)}", _FIX) for word in unknown]
    if given.experimental_rerun is not None:
        problems.append(Problem("--experimental-rerun", "reads a pickle, which may run code", "use `resume RUN`"))
    if given.config_dir is not None and not Path(given.config_dir).is_dir():
        problems.append(
            Problem("--config-dir", f"there is no folder '{given.config_dir}'", "name one with YAML of yours")
        )
    if given.shell_completion and not any(_COMPLETION.fullmatch(word) for word in given.overrides):
        problems.append(
            Problem("--shell-completion", "what shall it do?", 'as in: eval "$(loraplus-hydra -sc install=bash)"')
        )
    if problems:
        raise ConfigErrors(problems)
