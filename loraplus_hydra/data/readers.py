"""Readers of files. Each row has its file and line for error messages."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, Features, Value
from datasets.table import InMemoryTable

from loraplus_hydra.data.cache import cache_folder, digest, file_digest, generate_cached
from loraplus_hydra.data.exact_json import ExactJson, json_text
from loraplus_hydra.data.json_objects import json_objects
from loraplus_hydra.data.rows import CONTINUED, CONTINUES, ORIGIN, check_names, with_origin
from loraplus_hydra.data.streams import DAMAGED, bad_line, find_encoding, open_text, unreadable
from loraplus_hydra.errors import UserError, first_line

Row = dict[str, Any]

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
# Formats whose columns have types
TABLES = {"parquet": "a Parquet file", "arrow": "a file in one of Arrow's IPC formats"}
UNITS = ("file", "paragraph", "line")
PIECE = 1000  # minimum number of characters of a document in a row; the row ends at the next suitable line break


@dataclass(frozen=True)
class Layout:
    """The format of a file and the settings for reading it."""

    format: str | None  # jsonl | csv | parquet | arrow | text; None: by the file's suffix
    delimiter: str | None = None  # character between the cells of a CSV file; None: by the file's suffix
    header: bool = True  # True if the first row of a CSV file has the columns' names
    # Character around cells of a CSV file that contain the delimiter or a line break; None: no quotes
    quote: str | None = '"'
    encoding: str = "utf-8"
    unit: str = "file"  # the part of a text file that is one row, one of UNITS


def load_file(path: str, layout: Layout) -> Dataset:
    """Load the rows of a file as a Dataset on disk, with the column ORIGIN.

    All rows are read in advance. A JSONL file's columns keep lists, objects and mixed types of values unchanged. Raises
    UserError with the file and the line.
    """
    if layout.format in TABLES:
        return _load_table(path, layout.format)
    features = _features(read(path, layout))
    if features is None:
        raise UserError(f"{path} has no rows")
    # Tuples, because datasets would split list arguments into parts and read each part separately.
    encoded = tuple(name for name, feature in features.items() if isinstance(feature, ExactJson))
    arguments = {"path": path, "layout": layout, "names": tuple(features), "encoded": encoded}
    key = {"content": file_digest(path), "path": path, **asdict(layout)}
    return generate_cached(_encoded_rows, arguments, features=features, key=key)


def read(path: str, layout: Layout) -> Iterator[Row]:
    """Yield the rows of a JSONL, CSV or text file.

    Raises UserError with the file and the line.
    """
    assert layout.format is not None
    reader = {"jsonl": _read_json, "csv": _read_csv, "text": _read_text}[layout.format]
    encoding = find_encoding(path, layout.encoding)
    try:
        # Cells of a CSV file may contain line breaks.
        with open_text(path, encoding, newline="" if layout.format == "csv" else None) as file:
            yield from reader(path, file, layout)
    except UnicodeError as error:
        place = f"{path}{bad_line(path, encoding)}"
        advice = "save the file as UTF-8, or set its encoding, for example data.encoding=latin-1"
        raise UserError(f"{place}: not {encoding} text ({error}); {advice}") from None
    except DAMAGED as error:
        raise unreadable(path, error) from None


def _read_json(path: str, file: IO[str], _: Layout) -> Iterator[Row]:
    known: set[str] = set()
    for place, row in json_objects(path, file):
        if not known.issuperset(row):
            check_names(place, row)
            known.update(row)
        yield {**row, ORIGIN: place}


def _read_csv(path: str, file: IO[str], layout: Layout) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is too small for a long document
    quoting = {"quoting": csv.QUOTE_NONE} if layout.quote is None else {"quotechar": layout.quote, "strict": True}
    assert layout.delimiter is not None
    reader = csv.reader(file, delimiter=layout.delimiter, **quoting)  # type: ignore[arg-type]
    names: list[str] | None = None
    begun = 1
    try:
        for cells in reader:
            place, begun = f"{path}, line {begun}", reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = cells if layout.header else [str(index) for index in range(len(cells))]
                _check_header(path, names)
                if layout.header:
                    continue
            if len(cells) != len(names):
                hint = "; quote cells that contain the delimiter" if len(cells) > len(names) else ""
                raise UserError(f"{place}: there are {len(cells)} cells, but {len(names)} columns{hint}")
            yield {**dict(zip(names, cells, strict=True)), ORIGIN: place}
    except csv.Error as error:
        raise UserError(f"{path}, line {begun}: {error}") from None


def _check_header(path: str, names: list[str]) -> None:
    check_names(path, names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: there are two columns '{twice[0]}'; rename one")


def _read_text(path: str, file: IO[str], layout: Layout) -> Iterator[Row]:
    if layout.unit == "file":
        yield from _pieces(path, file)
        return
    lines: list[str] = []
    begun = 1
    for number, line in enumerate(file, start=1):
        if line.strip():
            begun = begun if lines else number
            lines.append(line)
        if lines and (layout.unit == "line" or not line.strip()):
            yield {"text": "".join(lines).rstrip("\n"), ORIGIN: f"{path}, line {begun}"}
            lines = []
    if lines:
        yield {"text": "".join(lines).rstrip("\n"), ORIGIN: f"{path}, line {begun}"}


def _pieces(path: str, file: IO[str]) -> Iterator[Row]:
    """Yield one document in rows of about PIECE characters. All rows except the last have CONTINUES."""
    lines: list[str] = []
    size, begun = 0, 1
    for number, line in enumerate(file, start=1):
        # A row begins with a word, because a cut inside white space could change the tokens.
        if size >= PIECE and not line[:1].isspace():
            yield {"text": "".join(lines), CONTINUED: begun > 1, CONTINUES: True, ORIGIN: f"{path}, line {begun}"}
            lines, size, begun = [], 0, number
        lines.append(line)
        size += len(line)
    if any(line.strip() for line in lines):
        yield {"text": "".join(lines), CONTINUED: begun > 1, CONTINUES: False, ORIGIN: f"{path}, line {begun}"}


def _features(rows: Iterator[Row]) -> Features | None:
    """Return column types that fit all rows, or None if there are no rows."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(_kind(value))
    if not kinds:
        return None
    return Features({name: _feature(each - {"null"}) for name, each in kinds.items()})


def _feature(kinds: set[str]) -> Any:
    if kinds <= {"string"}:
        return Value("string")
    if kinds == {"int64", "float64"}:
        return Value("float64")
    return Value(*kinds) if len(kinds) == 1 and kinds != {"other"} else ExactJson()


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "other"
    return {str: "string", float: "float64"}.get(type(value), "other")


def _encoded_rows(path: str, layout: Layout, names: tuple[str, ...], encoded: tuple[str, ...]) -> Iterator[Row]:
    """Yield rows with all columns `names`.

    The columns in `encoded` are JSON text, as ExactJson stores it.
    """
    for row in read(path, layout):
        values = {name: row.get(name) for name in names}
        for name in encoded:
            values[name] = None if values[name] is None else json_text(values[name])
        yield values


def _load_table(path: str, format: str) -> Dataset:
    """Load a file whose columns have types, with the column ORIGIN. Raises UserError."""
    try:
        content = file_digest(path)
        rows = _read_parquet(path, content) if format == "parquet" else _read_arrow(path)
    except Exception as error:  # datasets wraps all of Arrow's errors
        raise UserError(f"{path}: can't be read as {TABLES[format]}: {_first_cause(error)}") from None
    if rows is None or len(rows) == 0:
        raise UserError(f"{path} has no rows")
    check_names(path, rows.column_names)
    return with_origin(rows, path, digest({format: content, "path": path}))


def _read_parquet(path: str, content: str) -> Dataset | None:
    # Datasets fails on a file without rows, and logs a traceback for a broken file
    if pa.parquet.read_metadata(path).num_rows == 0:
        return None
    # A folder for each content: datasets knows a file only by its name and time, and a copy can keep the time.
    return Dataset.from_parquet(path, cache_dir=str(cache_folder() / content))


def _read_arrow(path: str) -> Dataset:
    """Read a file in either of Arrow's IPC formats.

    `datasets` writes the stream format; most other programs write the file format.
    """
    source = pa.memory_map(path)
    try:
        table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        table = pa.ipc.open_stream(source).read_all()
    return Dataset(InMemoryTable(table))


def _first_cause(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause)
