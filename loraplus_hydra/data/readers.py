"""Files -> rows, each with the place where it stands, so that whatever is wrong with a row can be told by its line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from loraplus_hydra.data.cache import cache_folder, digest, file_digest, generated
from loraplus_hydra.data.rows import CONTINUED, CONTINUES, ORIGIN, OURS
from loraplus_hydra.errors import UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, Features

Row = dict[str, Any]

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
UNITS = ("file", "paragraph", "line")
PIECE = 1000  # characters of a text file in a row, about: rows end where a line does


@dataclass(frozen=True)
class Layout:
    """How a file is written."""

    format: str  # jsonl | csv | parquet | text
    delimiter: str = ","  # between a CSV's cells
    header: bool = True  # a CSV's first row names its columns
    quote: str | None = '"'  # around a CSV's cells that hold the delimiter or a line's end; None: nothing is quoted
    encoding: str = "utf-8"
    unit: str = "file"  # what a row of a text file is: UNITS


def load_file(path: str, layout: Layout) -> Dataset:
    """The rows of a file as a Dataset on disk, with the column ORIGIN. Raises UserError naming the file and the line.

    Every row is read before any is used. Columns of a JSONL file whose values are lists, objects or of several kinds
    keep them as they are.
    """
    if layout.format == "parquet":
        return _load_parquet(path)
    features = _features(read(path, layout))
    if features is None:
        raise UserError(f"{path} has no rows")
    # Tuples: datasets would take lists among the arguments for parts to be read apart.
    encoded = tuple(name for name, feature in features.items() if type(feature).__name__ == "Json")
    key = {"content": file_digest(path), "path": path, **asdict(layout)}
    return generated(
        _encoded,
        {"path": path, "layout": layout, "names": tuple(features), "encoded": encoded},
        features=features,
        key=key,
    )


def read(path: str, layout: Layout) -> Iterator[Row]:
    """The rows of a JSONL, CSV or text file, one by one."""
    reader = {"jsonl": _read_jsonl, "csv": _read_csv, "text": _read_text}[layout.format]
    encoding = "utf-8-sig" if layout.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else layout.encoding
    try:
        # A CSV's cells may hold line ends of their own.
        with Path(path).open(encoding=encoding, newline="" if layout.format == "csv" else None) as file:
            yield from reader(path, file, layout)
    except UnicodeError as error:
        raise UserError(
            f"{path}{_undecodable_line(path, layout.encoding)}: not {layout.encoding} text ({error}); "
            "save it as UTF-8, or say what it is: data.encoding=latin-1"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _undecodable_line(path: str, encoding: str) -> str:
    """`, line 3` for the first line that isn't `encoding` text; nothing where lines can't be told apart as bytes."""
    if encoding.lower().startswith(("utf-16", "utf-32")):
        return ""
    with Path(path).open("rb") as file:
        bad = (number for number, line in enumerate(file, start=1) if not _decodes(line, encoding))
        number = next(bad, None)
    return "" if number is None else f", line {number}"


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True


def _read_jsonl(path: str, file: IO[str], _: Layout) -> Iterator[Row]:
    known: set[str] = set()
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:  # Python reads no number of thousands of digits
            raise UserError(f"{place}: {first_line(error)}") from None
        except RecursionError:
            raise UserError(f"{place}: nested too deeply") from None
        if not isinstance(row, dict):
            hint = "; a JSON array must be written as one object a line" if isinstance(row, list) else ""
            raise UserError(f"{place}: a {type(row).__name__}, where an object like {{...}} is needed{hint}")
        if "\\ud" in line.lower() and not _is_unicode(row):
            raise UserError(f"{place}: half a surrogate pair, which is no character")
        if not known.issuperset(row):
            check_names(place, row)
            known.update(row)
        yield {**row, ORIGIN: place}


def _is_unicode(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(path: str, file: IO[str], layout: Layout) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 128 KiB by default: less than a long document
    quoting = {"quoting": csv.QUOTE_NONE} if layout.quote is None else {"quotechar": layout.quote, "strict": True}
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
                hint = "; quote cells that hold the delimiter" if len(cells) > len(names) else ""
                raise UserError(f"{place}: {len(cells)} cells, where there are {len(names)} columns{hint}")
            yield {**dict(zip(names, cells, strict=True)), ORIGIN: place}
    except csv.Error as error:
        raise UserError(f"{path}, line {begun}: {error}") from None


def _check_header(path: str, names: list[str]) -> None:
    check_names(path, names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the column '{twice[0]}' is there twice; rename one")


def check_names(place: str, names: Iterable[str]) -> None:
    """Raise UserError for names of columns that can't be used: those of our own columns, and any that Arrow can't keep.

    `place` says where they stand.
    """
    for name in names:
        if name in OURS:
            raise UserError(f"{place}: '{name}' is the name of a column of our own; rename it")
        if "\0" in name:
            raise UserError(f"{place}: the name of a column holds a NUL character ({name!r}); is the file UTF-16 text?")


def _read_text(path: str, file: IO[str], layout: Layout) -> Iterator[Row]:
    if layout.unit == "file":
        yield from _pieces(path, file)
        return
    kept: list[str] = []
    begun = 1
    for number, line in enumerate(file, start=1):
        if line.strip():
            begun = begun if kept else number
            kept.append(line)
        if kept and (layout.unit == "line" or not line.strip()):
            yield {"text": "".join(kept).rstrip("\n"), ORIGIN: f"{path}, line {begun}"}
            kept = []
    if kept:
        yield {"text": "".join(kept).rstrip("\n"), ORIGIN: f"{path}, line {begun}"}


def _pieces(path: str, file: IO[str]) -> Iterator[Row]:
    """One document in rows of about PIECE characters, nothing lost; only the last doesn't continue."""
    kept: list[str] = []
    size, begun, number = 0, 1, 0
    for number, line in enumerate(file, start=1):
        # Where a word begins, so that no run of white space is torn.
        if size >= PIECE and not line[:1].isspace():
            yield {"text": "".join(kept), CONTINUED: begun > 1, CONTINUES: True, ORIGIN: f"{path}, line {begun}"}
            kept, size, begun = [], 0, number
        kept.append(line)
        size += len(line)
    if any(line.strip() for line in kept):
        yield {"text": "".join(kept), CONTINUED: begun > 1, CONTINUES: False, ORIGIN: f"{path}, line {begun}"}


def _features(rows: Iterator[Row]) -> Features | None:
    """What each column holds, from every row; None when there is no row."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(_kind(value))
    if not kinds:
        return None
    from datasets import Features, Json, Value

    def feature(found: set[str]) -> Any:
        found = found - {"null"}
        if found <= {"string"}:
            return Value("string")
        if found == {"int64", "float64"}:
            return Value("float64")
        return Value(found.pop()) if len(found) == 1 and found != {"other"} else Json()

    return Features({name: feature(found) for name, found in kinds.items()})


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "other"
    return {str: "string", float: "float64"}.get(type(value), "other")


def _encoded(path: str, layout: Layout, names: tuple[str, ...], encoded: tuple[str, ...]) -> Iterator[Row]:
    """Rows with all columns `names`, those in `encoded` as JSON text, as datasets' Json feature keeps them."""
    for row in read(path, layout):
        values = {name: row.get(name) for name in names}
        for name in encoded:
            values[name] = None if values[name] is None else json.dumps(values[name])
        yield values


def _load_parquet(path: str) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet
    from datasets import Dataset

    try:
        pa.parquet.read_metadata(path)  # datasets would log a traceback
        rows = Dataset.from_parquet(path, cache_dir=str(cache_folder()))
    except Exception as error:  # datasets wraps whatever Arrow says
        raise UserError(f"{path}: not a Parquet file that can be read: {_reason(error)}") from None
    if len(rows) == 0:
        raise UserError(f"{path} has no rows")
    check_names(path, rows.column_names)
    places = pa.array((f"{path}, row {number}" for number in range(1, len(rows) + 1)), type=pa.string())
    key = {"parquet": file_digest(path), "path": path}
    return rows.add_column(ORIGIN, places, new_fingerprint=digest(key))


def _reason(error: Exception) -> str:
    """The first line of what the innermost cause says."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause)
