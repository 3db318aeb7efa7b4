"""Rows from files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def load_jsonl(
    train: str,
    eval: str | None = None,
    eval_fraction: float = 0.05,
    max_samples: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Rows of one JSON object a line. Without `eval`, a share of `train`, drawn by `seed`, is held out."""
    from datasets import DatasetDict

    rows = _dataset(read_jsonl(train, max_samples))
    if eval is not None:
        return DatasetDict(train=rows, eval=_dataset(read_jsonl(eval, max_samples)))
    if len(rows) < 2:
        raise UserError(f"data.train: {train} has one row, so none can be held out; give data.eval a file of its own")
    split = rows.train_test_split(test_size=max(1, round(eval_fraction * len(rows))), seed=seed)
    return DatasetDict(train=split["train"], eval=split["test"])


def read_jsonl(path: str, max_samples: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, blank lines left out. Raises UserError with the line number of a broken line."""
    file_path = Path(path).expanduser()
    found = 0
    try:
        with file_path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if max_samples is not None and found >= max_samples:
                    return
                found += 1
                yield _object(path, number, line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    if not found:
        raise UserError(f"{path} has no rows")


def _object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: a {type(row).__name__}, where an object like {{...}} is needed")
    return row


def _dataset(rows: Iterator[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(list(rows))
