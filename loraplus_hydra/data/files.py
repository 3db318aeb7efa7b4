"""Rows from files: JSON, CSV, Parquet, Arrow or plain text, one file or several."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, concatenate_datasets, interleave_datasets

from loraplus_hydra.config.locations import expanded
from loraplus_hydra.data import mixing
from loraplus_hydra.data.exact_json import ExactJson
from loraplus_hydra.data.readers import FORMATS, TABLES, UNITS, Layout, load_file, read
from loraplus_hydra.data.rows import first_columns, with_columns
from loraplus_hydra.data.streams import SUFFIXES
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, errors_at, first_line, nearest, refuse

Files = str | list[str] | dict[str, float]
_FILES = "a path, a list of paths, or {path: weight, ...}"
_BUFFER = 1000  # number of streamed rows in the buffer that shuffles them


@dataclass(frozen=True)
class Source:
    """The files of one split."""

    key: str  # the config's key: data.train or data.eval
    paths: tuple[str, ...]
    layouts: tuple[Layout, ...]  # of each file
    weights: tuple[float, ...] | None = None  # the weight of each file in the mix; None: all rows of all files


def load(
    train: Files,
    eval: Files | None = None,
    *,
    eval_fraction: float = 0.05,
    max_samples: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    format: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    quote: str | None = '"',
    encoding: str = "utf-8",
    unit: str = "file",
) -> DatasetDict:
    """Load the rows of files as "train" and "eval".

    `train` and `eval` are a path, a pattern ("data/*.jsonl"), a list of these (all rows are used), or a mapping of
    paths to weights (rows are mixed in these shares, and none is repeated). Without `eval`, the share `eval_fraction`
    of each file is held out, drawn with `seed`. If a row is a piece of a document (`unit` is file), the end of each
    document is held out. At most `max_samples` rows of each split are used, drawn with `seed`. `streaming` reads the
    training rows when they are needed, and requires `eval`; `max_samples` are then the first training rows. A file
    can't be in both, unless all files are.

    `format` is jsonl (also for JSON arrays), csv, parquet, arrow or text; with None, the file's suffix decides. Files
    may be compressed by gzip, bzip2, xz, zstd or lz4. A byte order mark overrides `encoding`. `delimiter` (None: a tab
    for .tsv, otherwise a comma), `header` and `quote` are for CSV. `unit` (file, paragraph, line) is for plain text.

    Raises ConfigErrors for files that don't exist or are not valid in their format; the message has the line.
    """
    layout = Layout(format, {"tab": "\t", "\\t": "\t"}.get(str(delimiter), delimiter), header, quote, encoding, unit)
    _check_layout(layout)
    source = _source("data.train", train, layout)
    eval_source = None if eval is None else _source("data.eval", eval, layout)
    if eval_source is None:
        if streaming:
            what = "rows can't be held out from streamed rows, because their number is unknown"
            raise ConfigErrors([Problem("data.eval", what, "set files for evaluation: data.eval=...")])
        halves = [_hold_out(source.key, path, part, eval_fraction, seed) for path, part in _parts(source)]
        with errors_at(source.key):
            rows, held_out = (mixing.mix(part, source.weights, seed, max_samples) for part in zip(*halves, strict=True))
    else:
        _refuse_shared(source, eval_source)
        rows = (_stream if streaming else _mixed)(source, seed, max_samples)
        held_out = _mixed(eval_source, seed, max_samples)
    return DatasetDict(train=rows, eval=held_out)


def _check_layout(layout: Layout) -> None:
    """Raise ConfigErrors with all errors in a layout. Its format may still be None."""
    problems, formats = [], _formats()
    if layout.format is not None and layout.format not in formats:
        fix = f"use one of {', '.join(formats)}; with null, the file's suffix decides"
        what = f"there is no format '{layout.format}'{nearest(layout.format, formats)}"
        problems.append(Problem("data.format", what, fix))
    if layout.unit not in UNITS:
        what = f"there is no unit '{layout.unit}'{nearest(layout.unit, UNITS)}"
        problems.append(Problem("data.unit", what, f"use one of {', '.join(UNITS)}"))
    for key, value, fix in (
        ("delimiter", layout.delimiter, "write `tab` for a tab"),
        ("quote", layout.quote, "use null if the file has no quotes"),
    ):
        if value is not None and len(value) != 1:
            problems.append(Problem(f"data.{key}", f"'{value}' is not one character", fix))
    try:
        "a".encode(layout.encoding)  # some of Python's codecs are not text encodings: zlib, rot13
    except (LookupError, TypeError, ValueError):
        fix = "use, for example, utf-8, latin-1, cp1252 or utf-16"
        problems.append(Problem("data.encoding", f"there is no encoding '{layout.encoding}'", fix))
    refuse(problems)


def _formats() -> list[str]:
    return sorted(set(FORMATS.values()))


def _layout_of(path: str, layout: Layout, key: str) -> Layout:
    """Return `layout` with the format and delimiter of this file."""
    name = Path(path).name.lower()
    # "rows.jsonl.gz" has the format of "rows.jsonl".
    suffix = Path(name.removesuffix(Path(name).suffix) if name.endswith(SUFFIXES) else name).suffix
    format = layout.format or FORMATS.get(suffix)
    if format is None:
        fix = f"set its format: data.format is one of {', '.join(_formats())}"
        raise ConfigErrors([Problem(key, f"{path}: no format has the suffix '{suffix}'", fix)])
    return replace(layout, format=format, delimiter=layout.delimiter or ("\t" if suffix == ".tsv" else ","))


def _source(key: str, files: Files, layout: Layout) -> Source:
    if isinstance(files, dict):
        paths, weights = _weighted_files(key, files), tuple(float(weight) for weight in files.values())
    else:
        listed = files if isinstance(files, list) else [files]
        paths, weights = [path for pattern in listed for path in _paths(key, pattern)], None
    if not paths:
        raise ConfigErrors([Problem(key, "names no file", _FILES)])
    _refuse_twice(key, paths)
    return Source(key, tuple(paths), tuple(_layout_of(path, layout, key) for path in paths), weights)


def _refuse_twice(key: str, paths: list[str]) -> None:
    """Raise ConfigErrors if two paths are the same file."""
    # Patterns that overlap would repeat rows without a word.
    counts = Counter(identities := [_identity(path) for path in paths])
    twice = [path for path, identity in zip(paths, identities, strict=True) if counts[identity] > 1]
    refuse([Problem(key, f"{path} is named twice", "name each file once") for path in twice])


def _refuse_shared(train: Source, held_out: Source) -> None:
    """Raise ConfigErrors if some files are in both splits."""
    # The same files for both are no oversight: an evaluation of a run uses its rows in place of training rows.
    files, others = ({_identity(path) for path in source.paths} for source in (train, held_out))
    shared = [path for path in held_out.paths if files != others and _identity(path) in files]
    fix = "leave it out of one of them"
    refuse([Problem(held_out.key, f"{path} is also in {train.key}", fix) for path in shared])


def _identity(path: str) -> tuple[int, int]:
    """Return two numbers that are equal for every name of a file, links included."""
    stat = Path(path).stat()
    return stat.st_dev, stat.st_ino


def _weighted_files(key: str, weights: Mapping[str, float]) -> list[str]:
    problems, paths = [], []
    for pattern, weight in weights.items():
        matches = _paths(key, pattern)
        paths += matches
        if len(matches) > 1:
            fix = "give each file its own weight"
            problems.append(Problem(key, f"{pattern} matches several files, but a weight is for one file", fix))
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            problems.append(Problem(key, f"the weight of {pattern} is {weight}", "give it a finite number above 0"))
    refuse(problems)
    return paths


def _paths(key: str, pattern: Any) -> list[str]:
    """Return the files that a path or a pattern matches.

    Raises ConfigErrors if there is none.
    """
    if not isinstance(pattern, str) or not pattern.strip():
        raise ConfigErrors([Problem(key, f"'{pattern}' is not a path", _FILES)])
    try:
        return _matches(key, pattern)
    except (OSError, RuntimeError, re.error) as error:  # a too long name, an unknown user's home, or an invalid pattern
        what = f"'{pattern[:100]}' is not a valid path: {first_line(error)[:200]}"
        raise ConfigErrors([Problem(key, what, "name a file that exists")]) from error


def _matches(key: str, pattern: str) -> list[str]:
    path = expanded(pattern)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        suffixes = [each.suffix for each in sorted(path.iterdir()) if each.suffix in FORMATS]
        fix = f"give the files in it, for example '{pattern.rstrip('/')}/*{next(iter(suffixes), '.jsonl')}'"
        raise ConfigErrors([Problem(key, f"{pattern} is a folder", fix)])
    if glob.has_magic(pattern):
        names = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not names:
            raise ConfigErrors([Problem(key, f"no file matches {pattern}", _looked_for_in(path))])
        return names
    if what := _special(path):
        raise ConfigErrors([Problem(key, f"{pattern} {what}", "give the path of a regular file")])
    if "://" in pattern:
        raise ConfigErrors([Problem(key, f"{pattern} is a URL", "download the file, or use its data set: data=hub")])
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    what, fix = f"{pattern}: No such file{nearest(path.name, siblings)}", _looked_for_in(path)
    if re.fullmatch(r"[\w.-]+/[\w-]+", pattern):
        fix += f", or a data set on the hub: data=hub data.name={pattern}"
    raise ConfigErrors([Problem(key, what, fix)])


def _special(path: Path) -> str:
    """Return what a path is if it is not a regular file; empty if it doesn't exist."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist"
    kinds = {"is a pipe": path.is_fifo(), "is a socket": path.is_socket()}
    kinds["is a device"] = path.is_char_device() or path.is_block_device()
    return next((f"{kind}, not a file" for kind, true in kinds.items() if true), "")


def _looked_for_in(path: Path) -> str:
    """Return the last part of the message about a path that doesn't exist."""
    folder = path.parent.absolute()
    exists = folder.is_dir() or glob.has_magic(str(folder))
    place = f"it was searched for in {folder}" if exists else f"there is no folder {folder}"
    return f"{place}: give the path of an existing file"


def _parts(source: Source) -> Iterator[tuple[str, Dataset]]:
    for path, layout in zip(source.paths, source.layouts, strict=True):
        with errors_at(source.key):
            yield path, load_file(path, layout)


def _mixed(source: Source, seed: int, limit: int | None) -> Dataset:
    parts = [part for _, part in _parts(source)]
    with errors_at(source.key):
        return mixing.mix(parts, source.weights, seed, limit)


def _hold_out(key: str, path: str, rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        fix = "set data.eval to another file"
        raise ConfigErrors([Problem(key, f"{path} has only one row, so none can be held out", fix)])
    return mixing.hold_out(rows, fraction, seed)


def _stream(source: Source, seed: int, limit: int | None) -> IterableDataset:
    """Return the first `limit` rows as a stream, shuffled in a buffer.

    With weights, rows are drawn in these shares. Without weights, the first rows come in turn from all files, but
    documents keep their order. Raises ConfigErrors.
    """
    documents = any(layout.format == "text" and layout.unit == "file" for layout in source.layouts)
    if documents and source.weights is not None:
        fix = "use data.unit=paragraph or line"
        raise ConfigErrors([Problem(source.key, "streamed documents can't be mixed with weights", fix)])
    if any(layout.format in TABLES for layout in source.layouts):
        fix = "set it to false; to stream a folder of such files use data=hub data.name=FOLDER"
        what = "Parquet and Arrow files are always read when they are needed"
        raise ConfigErrors([Problem("data.streaming", what, fix)])
    several = len(source.paths) > 1
    files = list(zip(source.paths, source.layouts, strict=True))
    names = dict.fromkeys(name for path, layout in files for name in _first_columns(source.key, path, layout))
    parts = [_streamed_file(path, layout, whole=several) for path, layout in files]
    if source.weights is not None:
        shares = [weight / sum(source.weights) for weight in source.weights]
        rows = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
        if limit is not None:  # each epoch would draw other rows of the parts, but not behind a generator
            rows = IterableDataset.from_generator(_all_of, gen_kwargs={"rows": rows})
    elif several and limit is not None and not documents:
        rows = interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
    else:
        rows = concatenate_datasets(parts) if several else parts[0]
    if several:
        rows = rows.map(lambda value: value["row"], remove_columns=["row"])
    # Before rows are shuffled, so that the columns don't depend on the seed.
    rows = with_columns(rows, list(names))
    # Before rows are shuffled, because they are shuffled anew for each epoch.
    rows = mixing.draw(rows, limit, seed)
    # The pieces of a document must keep their order.
    return rows if documents else rows.shuffle(seed=seed, buffer_size=_BUFFER)


def _first_columns(key: str, path: str, layout: Layout) -> list[str]:
    with errors_at(key):
        names = first_columns(read(path, layout))
        if not names:
            raise UserError(f"{path} has no rows")
    return names


def _streamed_file(path: str, layout: Layout, *, whole: bool) -> IterableDataset:
    """Return a file's rows as a stream. If `whole`, each row is one JSON value in the column `row`."""
    arguments = {"path": path, "layout": layout}
    # Rows may differ in type, but `datasets` would infer one type for each column when streams are joined.
    features = Features({"row": ExactJson()}) if whole else None
    return IterableDataset.from_generator(_whole_rows if whole else read, features, gen_kwargs=arguments)


def _all_of(rows: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from rows


def _whole_rows(path: str, layout: Layout) -> Iterator[dict[str, Any]]:
    for row in read(path, layout):
        yield {"row": row}
