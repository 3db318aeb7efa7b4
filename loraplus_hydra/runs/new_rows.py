"""Rows of a run that are others after a change of its `data` group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraplus_hydra.config.schema import COLUMN_SUFFIX
from loraplus_hydra.io.fingerprints import OF_ROWS

_TRAIN, _EVAL = OF_ROWS
# Keys of the package's loaders that name the rows of one split
_NAMES = {"train": _TRAIN, "train_split": _TRAIN, "eval": _EVAL, "eval_split": _EVAL}


def named_rows(given: Mapping[Any, Any], then: Mapping[Any, Any], now: Mapping[Any, Any]) -> frozenset[str]:
    """Return which of OF_ROWS a command with the `data` keys `given` names, or reads in another way.

    `then` and `now` are the run's `data` group without and with these keys. Rows named again by the same path are new
    rows, because the user has asked for what the file has now.
    """
    keys = [key for key, value in given.items() if value != then.get(key) or (key in _NAMES and value is not None)]
    return changed_rows(keys, then, now)


def changed_rows(keys: Iterable[str], then: Mapping[Any, Any], now: Mapping[Any, Any]) -> frozenset[str]:
    """Return which of OF_ROWS are others if these keys of `data` differ between `then` and `now`."""
    # Rows for evaluation that no key names are taken from the training rows, so both change together
    held_out = not all(data.get("eval") or data.get("eval_split") for data in (then, now))
    found: set[str] = set()
    for key in keys:
        if key in _NAMES and not held_out:
            found.add(_NAMES[key])
        elif not key.endswith(COLUMN_SUFFIX) and (held_out or key != "eval_fraction"):
            found.update(OF_ROWS)
    return frozenset(found)
