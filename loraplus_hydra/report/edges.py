"""Swept keys whose best value is the smallest or largest one, and the command that extends the sweep."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loraplus_hydra.config.schema import value_ranges
from loraplus_hydra.config.types import fits, is_finite
from loraplus_hydra.io.read import parse_yaml, read_or
from loraplus_hydra.report.results import SweepResults
from loraplus_hydra.report.settings import value_of
from loraplus_hydra.report.values import number

_FEWEST = 3  # values that make a grid; two are compared, and have equal differences by chance
_RATIO = "loraplus.ratio"
# A search chooses its values itself, and its study accepts no other ones.
_SEARCHES = ("hydra/sweeper=", "hparams_search=optuna", "hparams_search=tune")
PROGRAM = ["python", "-m", "loraplus_hydra"]
_DIGITS = 12  # significant digits of a next value; fewer than a float has, to drop rounding errors


@dataclass(frozen=True)
class Edge:
    """A swept key whose best value is at the edge of its values."""

    key: str
    best: float
    upper: bool  # True if the best is the largest value
    values: tuple[float, ...]  # all swept values, sorted
    next: float  # the value beyond the edge, at the grid's own step

    @property
    def next_text(self) -> str:
        return as_text(self.next)


def edges(results: SweepResults) -> tuple[Edge, ...]:
    """Return the edges at which the best setting lies. Seeds, searches and natural bounds are no edges."""
    if results.outcome.best is None or any(word.startswith(_SEARCHES) for word in command_words(results.sweep.command)):
        return ()
    return tuple(edge for key in results.compared if (edge := _edge(results, key)) is not None)


def extending_command(results: SweepResults, found: Sequence[Edge]) -> str:
    """Return the sweep's command with the edges' next values; empty if the command is unknown."""
    words = command_words(results.sweep.command)
    if not found or not words:
        return ""
    for at, value in _missing_values(results, words):
        words[at] += f",{as_text(value)}"
    for edge in found:
        place = _place(words, edge.key)
        if place is None:  # the values are in the YAML of a ready-made sweep
            words.append(f"{edge.key}={','.join(map(as_text, (*edge.values, edge.next)))}")
        else:
            words[place] += f",{edge.next_text}"
    return shlex.join([*PROGRAM, *words])


def _missing_values(results: SweepResults, words: Sequence[str]) -> Iterator[tuple[int, float]]:
    """Yield the best setting's values that the command lacks, because another command ran that job."""
    best = results.outcome.best.values if results.outcome.best else {}
    for key in results.compared:
        place, value = _place(words, key), number(best.get(key))
        listed = _listed(results.sweep.command, key)
        if place is not None and value is not None and listed is not None and value not in listed:
            yield place, value


def next_value(values: Iterable[float], *, upper: bool) -> float | None:
    """Return the value beyond the largest or smallest one, at the grid's own step; None if unknown.

    A grid has equal differences, equal factors, or the same digits in each decade (1, 3, 10, 30). In any other grid,
    and with two values, the factor between the two values at the edge is used again.
    """
    ordered = sorted(set(values), reverse=not upper)
    steps = [after - before for before, after in pairwise(ordered)]
    if not steps:
        return None
    if len(ordered) >= _FEWEST and _equal(steps):
        following = ordered[-1] + steps[-1]
        return None if min(ordered) >= 0 and following <= 0 else _rounded(following)
    positive = [value for value in ordered if value > 0]  # a zero is often beside values with equal factors
    if ordered[-1] <= 0 or min(ordered) < 0 or len(positive) < 2:
        return None
    factors = [after / before for before, after in pairwise(positive)]
    if not _equal(factors) and (by_digits := _next_by_digits(positive, upper=upper)) is not None:
        return by_digits
    return _rounded(positive[-1] * factors[-1])


def as_text(value: float) -> str:
    """Return a value as Hydra reads it: 3e-5, 0.01, 64."""
    text = f"{value:.{_DIGITS}g}"
    if abs(value) < 1:
        mantissa, exponent = f"{value:.{_DIGITS - 1}e}".split("e")
        text = min(text, f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}", key=len)
    return text.replace("e+0", "e")


def _edge(results: SweepResults, key: str) -> Edge | None:
    best = number(results.outcome.best.values.get(key)) if results.outcome.best else None
    listed = _listed(results.sweep.command, key)
    jobs = [job for job in results.sweep.jobs if key in results.sweep.swept or key in job.given]
    raw = [value for job in jobs if number(value := value_of(job, key)) is not None]
    if best is None or listed is None or not raw:
        return None
    values = tuple(sorted({*map(float, raw), *listed}))
    if len(values) < _FEWEST or best not in (values[0], values[-1]):
        return None
    upper = best == values[-1]
    if key == _RATIO and not upper and best <= 1:
        return None  # plain LoRA is the natural bound
    following = next_value(values, upper=upper)
    whole = all(isinstance(value, int) for value in raw)
    if (
        following is None
        or not is_finite(following)
        or (whole and following != int(following))
        or not _in_range(key, following, whole=whole)
    ):
        return None
    return Edge(key, best, upper, values, following)


def _in_range(key: str, value: float, *, whole: bool) -> bool:
    """Return False if the config's schema doesn't allow the value."""
    if key not in value_ranges():
        return True
    annotation, limits = value_ranges()[key]
    typed = int(value) if whole else value
    return fits(typed, annotation) and limits.holds(typed)


def command_words(command: str) -> list[str]:
    """Return a sweep's overrides; none if the text is not such a command."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    return words[len(PROGRAM) :] if words[: len(PROGRAM)] == PROGRAM else []


def _place(words: Sequence[str], key: str) -> int | None:
    """Return the place of the key's last override."""
    return next((at for at in reversed(range(len(words))) if words[at].lstrip("+").partition("=")[0] == key), None)


def _listed(command: str, key: str) -> list[float] | None:
    """Return the key's values in the command; None if they are not a list of numbers.

    Without an override of the key, the list is empty.
    """
    words = command_words(command)
    place = _place(words, key)
    if place is None:
        return []
    values = list(_numbers(words[place].partition("=")[2]))
    return None if None in values else [value for value in values if value is not None]


def _numbers(text: str) -> Iterator[float | None]:
    for part in text.split(","):
        # YAML needs a point in a number with an exponent, but Hydra does not
        point = re.sub(r"^([+-]?\d+)([eE])", r"\1.0\2", part.strip())
        yield number(read_or(None, parse_yaml, point))


def _equal(steps: Sequence[float]) -> bool:
    return all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _next_by_digits(values: Sequence[float], *, upper: bool) -> float | None:
    """Return the next value of a grid with the same digits in each decade; None for another grid."""
    parts = [_digits(value) for value in values]
    digits = sorted({digit for digit, _ in parts})
    if len(digits) == len(parts) and digits != [1, 2, 5]:
        return None  # no digit is repeated, so the next decade is unknown
    decades = [decade for _, decade in parts]
    pattern = [(digit, decade) for decade in range(min(decades) - 1, max(decades) + 2) for digit in digits]
    first, last = sorted((pattern.index(parts[0]), pattern.index(parts[-1])))
    if pattern[first : last + 1] != sorted(parts, key=pattern.index):
        return None
    digit, decade = pattern[last + 1] if upper else pattern[first - 1]
    return float(f"{digit}e{decade}")


def _digits(value: float) -> tuple[float, int]:
    """Return 3.0 and -4 for 3e-4."""
    mantissa, exponent = f"{value:.5e}".split("e")
    return float(mantissa), int(exponent)
