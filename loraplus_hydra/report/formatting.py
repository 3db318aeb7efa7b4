"""Short text for numbers and keys on the page, in figures and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from loraplus_hydra.io.text import presentable

ABSENT = "–"  # noqa: RUF001


def short(value: Any) -> str:
    """Return a setting's value as text (8e-4 for 0.0008, a dash for None)."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    # A whole number, such as a seed, in all its digits, because others may begin with the same ones
    if not isinstance(value, float) or not math.isfinite(value):
        return presentable(str(value))
    if value != 0 and (abs(value) < 1e-2 or abs(value) >= 1e4):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def measured(value: float | None) -> str:
    """Return a metric as text, with four decimals unless it is very small or large."""
    if value is None:
        return ABSENT
    return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 else f"{value:.4g}"


def with_spread(mean: float | None, spread: float | None) -> str:
    """Return `3.6170 ± 0.0040`, or only the mean if there is no spread."""
    if mean is None or spread is None:
        return measured(mean)
    digits = f"{spread:.4f}" if spread >= 5e-5 and abs(mean) < 1e4 else f"{spread:.2g}"
    return f"{measured(mean)} ± {digits}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 job`, `3 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def names(keys: Sequence[str]) -> dict[str, str]:
    """Return a short name for each dotted key: its shortest unique end."""
    found = {}
    for key in keys:
        parts = key.split(".")
        found[key] = next(
            name
            for size in range(1, len(parts) + 1)
            if sum(other == (name := ".".join(parts[-size:])) or other.endswith(f".{name}") for other in keys) == 1
            or size == len(parts)
        )
    return found


def clipped(text: str, most: int = 24) -> str:
    """Return `text`, without its middle if it has more than `most` characters."""
    start = most // 3  # the end is longer, because paths differ there
    return text if len(text) <= most else f"{text[:start]}…{text[start + 1 - most :]}"


def folded(parts: Iterable[str], width: int, most: int = 4) -> str:
    """Join the parts into at most `most` lines of `width` characters. Lines break between parts."""
    lines = [""]
    for part in parts:
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    kept = [line.rstrip() for line in lines[:most]]
    return "\n".join(kept) + (" …" if len(lines) > most else "")
