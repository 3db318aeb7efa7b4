"""Fingerprints of rows.

A fingerprint depends only on the rows' values, not on their file, folder or storage format.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset

from loraplus_hydra.data.rows import ORIGIN, SPLITS, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem, errors_at

LARGEST = 2**31  # bytes; larger data is not hashed completely, but only every second, third, ... batch
_BATCH = 1000  # rows
_STREAM = "data.train"
_FIRST = 1000  # number of a stream's rows in its fingerprint
_TEXTS = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)


@dataclass
class RowsRead:
    """The rows of a stream that the current epoch has read. `digest` identifies the rows and their order."""

    expected: tuple[int, str] | None = None  # (number of rows, digest that must be reached after this number)
    count: int = 0
    digest: str = ""

    def see(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Add a row of the stream to the record, and return the row. Raises ConfigErrors for unexpected rows."""
        if index == 0:  # a new epoch begins
            self.count, self.digest = 0, ""
        values = {name: value for name, value in row.items() if name != ORIGIN}
        # A chain of digests, because datasets pickles its functions and a hash object can't be pickled.
        text = self.digest + json.dumps(values, sort_keys=True, default=_shown)
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.count += 1
        if self.expected is not None and self.count == self.expected[0]:
            if self.digest != self.expected[1]:
                what = f"the first {self.count:,} rows of the stream differ from the rows that the run has read"
                fix = "restore the run's own rows, choose others with data.train=..., or set allow_changed_inputs=true"
                raise ConfigErrors([Problem(_STREAM, what, fix)])
            self.expected = None
        return row


def _shown(value: Any) -> str:
    """Return a text for a value that JSON doesn't have, such as a date.

    An object's address is no part of it.
    """
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


def fingerprints(rows: DatasetDict) -> dict[str, str]:
    """Return the fingerprint of each split, by the split's key. A stream's has only its first rows."""
    with errors_at(_STREAM):
        return {
            f"data.{split}": (_of_first if is_streamed(rows[split]) else fingerprint)(rows[split]) for split in SPLITS
        }


def _of_first(rows: IterableDataset) -> str:
    read = RowsRead()
    for index, row in enumerate(islice(rows, _FIRST)):
        read.see(row, index)
    return f"first {read.count:,} rows {read.digest}"


def watched(rows: DatasetDict) -> tuple[DatasetDict, RowsRead | None]:
    """Return the rows, and a record of the rows read from a training stream (None without a stream)."""
    if not is_streamed(rows["train"]):
        return rows, None
    read = RowsRead()
    stream: IterableDataset = rows["train"]
    seen = stream.map(read.see, with_indices=True, features=stream.features)
    return DatasetDict({**rows, "train": seen}), read


def fingerprint(rows: Dataset, *, largest: int = LARGEST) -> str:
    """Return the number of rows, and 32 hex digits that identify the values in order.

    The order of columns and the rows' places are ignored. If the rows have more than `largest` bytes, only a fixed part
    of the batches is hashed.
    """
    batches, values = rows.with_format("arrow"), hashlib.blake2b(digest_size=16)
    stride = 1 + rows.data.nbytes * len(rows) // max(1, len(rows.data)) // largest
    for start in range(0, len(rows), _BATCH * stride):
        batch: pa.Table = batches[start : start + _BATCH]
        for name in sorted(set(batch.column_names) - {ORIGIN}):
            values.update(name.encode())
            _add(values, pa.concat_arrays(batch.column(name).chunks))
    return f"{len(rows):,} rows {values.hexdigest()}"


def _add(digest: Any, array: pa.Array) -> None:
    """Add the values of an Arrow array to a hash."""
    # Not the array's buffers, because equal values can have different buffers, for example after a slice or for nulls.
    digest.update(len(array).to_bytes(8, "little"))
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        digest.update(_bytes(array.is_valid()))
        array = array.drop_null()
    kind = array.type
    if pa.types.is_struct(kind):
        for index in sorted(range(kind.num_fields), key=lambda number: kind.field(number).name):
            digest.update(kind.field(index).name.encode())
            _add(digest, array.flatten()[index])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(_bytes(array.value_lengths().cast(pa.int64())))
        _add(digest, array.flatten())
    elif any(holds(kind) for holds in _TEXTS):
        digest.update(_bytes(pc.binary_length(array).cast(pa.int64())))
        width = np.int64 if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) else np.int32
        first, last = np.frombuffer(array.buffers()[1], width)[[array.offset, array.offset + len(array)]]
        digest.update(memoryview(array.buffers()[2] or b"")[first:last])
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        digest.update(_bytes(array))
    else:
        digest.update(repr(array.to_pylist()).encode())


def _bytes(array: pa.Array) -> bytes:
    values: np.ndarray[Any, Any] = array.to_numpy(zero_copy_only=False)
    return values.tobytes()
