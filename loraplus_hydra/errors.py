"""Errors for users: one problem, a list of problems, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class UserError(ValueError):
    """An error that the user can fix. Its text is the whole message, shown without a traceback."""


@dataclass(frozen=True)
class Problem:
    """One error in a config: its key, the error, and a valid alternative."""

    key: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.what}" + (f"; {self.fix}" if self.fix else "")


class ConfigErrors(UserError):
    """All errors found in a config."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, "ConfigErrors needs at least one problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))


def refuse(problems: Iterable[Problem]) -> None:
    """Raise ConfigErrors if there are problems."""
    if found := tuple(problems):
        raise ConfigErrors(found)


@contextmanager
def errors_at(key: str) -> Iterator[None]:
    """Turn a UserError raised inside into ConfigErrors at `key`. ConfigErrors stay unchanged."""
    try:
        yield
    except ConfigErrors:
        raise
    except UserError as error:
        raise ConfigErrors([Problem(key, str(error))]) from error


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean 'adamw'?)`, or an empty string if no candidate is similar to `name`."""
    matches = difflib.get_close_matches(str(name), [str(candidate) for candidate in candidates], n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def first_of(names: Sequence[str], most: int) -> str:
    """Return the first `most` names and the number of others: `a, b, c and 2 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or the name of its type if it has no text.

    A final dot is removed, because the line becomes a part of a sentence.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line if line.endswith("..") else line.removesuffix(".")
