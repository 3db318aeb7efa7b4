"""Rows from files: JSONL, CSV, Parquet or plain text, one file or several."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra.data import mixing
from loraplus_hydra.data.readers import FORMATS, UNITS, Layout, load_file, read
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

Files = str | list[str] | dict[str, float]
_KINDS_OF_VALUES = "a path, a list of paths, or {path: weight, ...}"
_SHUFFLED = 1000  # streamed rows that are held to be shuffled among each other


@dataclass(frozen=True)
class Source:
    """The files of one split: their paths, and how much each weighs in the mix (None: each whole)."""

    key: str  # data.train or data.eval
    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None


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
    """The rows of files as a DatasetDict of "train" and "eval".

    `train` and `eval` are a path, a pattern ("data/*.jsonl"), a list of these (all rows of each), or a mapping of paths
    to weights (rows in these shares, none twice). Without `eval`, the share `eval_fraction` of each file is held out,
    drawn by `seed`; of text files whose unit is the file it is the end of each. `max_samples` rows of each split are
    drawn by `seed`. `format` (jsonl, csv, parquet, text; None: by the file's suffix), `delimiter` (None: a tab for
    .tsv, else a comma), `header`, `quote`, `encoding` and `unit` (file, paragraph, line) say how the files are written.
    `streaming` reads the training rows as they are needed; `eval` must then be given.

    Raises ConfigErrors: a file that isn't there or isn't what its format says, with the line.
    """
    layout = _layout_arguments(format, delimiter, header, quote, encoding, unit)
    sources = [_source("data.train", train)]
    if eval is not None:
        sources.append(_source("data.eval", eval))
    from datasets import DatasetDict

    if streaming:
        if eval is None:
            fix = "name files to evaluate on: data.eval=..."
            raise ConfigErrors(
                [Problem("data.eval", "of streamed rows none can be held out, since they have no end", fix)]
            )
        streamed = _stream(sources[0], layout, seed)
        rows = DatasetDict(train=streamed if max_samples is None else streamed.take(max_samples))
        rows["eval"] = mixing.draw(_mixed(sources[1], layout, seed), max_samples, seed)
        return rows
    if eval is None:
        halves = [_hold_out(sources[0], path, part, eval_fraction, seed) for path, part in _parts(sources[0], layout)]
        splits = [mixing.mix(parts, sources[0].weights, seed) for parts in zip(*halves, strict=True)]
    else:
        splits = [_mixed(source, layout, seed) for source in sources]
    splits = [mixing.draw(split, max_samples, seed) for split in splits]
    return DatasetDict(train=splits[0], eval=splits[1])


def _layout_arguments(
    format: str | None, delimiter: str | None, header: bool, quote: str | None, encoding: str, unit: str
) -> dict[str, Any]:
    """The arguments of Layout that don't depend on the file; raises ConfigErrors with all that are wrong."""
    problems = []
    formats = sorted(set(FORMATS.values()))
    if format is not None and format not in formats:
        fix = f"one of: {', '.join(formats)}, or null: by the file's suffix"
        problems.append(Problem("data.format", f"there is no format '{format}'{nearest(format, formats)}", fix))
    if unit not in UNITS:
        fix = f"one of: {', '.join(UNITS)}"
        problems.append(Problem("data.unit", f"there is no unit '{unit}'{nearest(str(unit), UNITS)}", fix))
    delimiter = {"tab": "\t", "\\t": "\t"}.get(str(delimiter), delimiter)
    for key, value in (("delimiter", delimiter), ("quote", quote)):
        if value is not None and (not isinstance(value, str) or len(value) != 1):
            fix = "for a tab write tab" if key == "delimiter" else "or null: nothing is quoted"
            problems.append(Problem(f"data.{key}", f"'{value}' is not one character", fix))
    try:
        "a".encode(encoding)  # some of Python's codecs are none of text: zlib, rot13
    except (LookupError, TypeError, ValueError):
        fix = "such as utf-8, latin-1, cp1252, utf-16"
        problems.append(Problem("data.encoding", f"there is no encoding '{encoding}'", fix))
    if problems:
        raise ConfigErrors(problems)
    return {
        "format": format,
        "delimiter": delimiter,
        "header": header,
        "quote": quote,
        "encoding": encoding,
        "unit": unit,
    }


def _layout(path: str, arguments: Mapping[str, Any], key: str) -> Layout:
    suffix = Path(path).suffix.lower()
    format = arguments["format"] or FORMATS.get(suffix)
    if format is None:
        fix = "say what it is: data.format=jsonl, csv, parquet or text"
        raise ConfigErrors([Problem(key, f"{path}: no format goes by the suffix '{suffix}'", fix)])
    delimiter = arguments["delimiter"] or ("\t" if suffix == ".tsv" else ",")
    return Layout(**{**arguments, "format": format, "delimiter": delimiter})


def _source(key: str, files: Files) -> Source:
    """The files that a split's value names."""
    if isinstance(files, dict):
        return _weighed_source(key, files)
    listed = files if isinstance(files, list) else [files]
    paths = tuple(path for pattern in listed for path in _paths(key, pattern))
    if not paths:
        raise ConfigErrors([Problem(key, "names no file", _KINDS_OF_VALUES)])
    return Source(key, paths)


def _weighed_source(key: str, weights: Mapping[str, float]) -> Source:
    problems, paths = [], []
    for pattern, weight in weights.items():
        found = _paths(key, pattern)
        paths += found
        if len(found) > 1:
            fix = "give each file a weight of its own"
            problems.append(Problem(key, f"{pattern} names several files, and a weight belongs to one", fix))
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            problems.append(Problem(key, f"the weight of {pattern} is {weight}", "give it a finite number above 0"))
    if problems or not paths:
        raise ConfigErrors(problems or [Problem(key, "names no file", _KINDS_OF_VALUES)])
    return Source(key, tuple(paths), tuple(float(weight) for weight in weights.values()))


def _paths(key: str, pattern: Any) -> list[str]:
    """The files that a path or a pattern stands for."""
    if not isinstance(pattern, str) or not pattern.strip():
        raise ConfigErrors([Problem(key, f"'{pattern}' is no path", _KINDS_OF_VALUES)])
    try:
        return _files_of(key, pattern)
    except (OSError, RuntimeError, re.error) as error:  # too long a name, no such user's home, a pattern that is none
        what = f"'{pattern[:100]}' names no file: {first_line(error)[:200]}"
        raise ConfigErrors([Problem(key, what, "name a file that is there")]) from error


def _files_of(key: str, pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        fix = f"name its files, for example '{pattern.rstrip('/')}/*.jsonl'"
        raise ConfigErrors([Problem(key, f"{pattern} is a folder", fix)])
    if glob.has_magic(pattern):
        found = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise ConfigErrors([Problem(key, f"no file matches {pattern}", _looked_for_in(path))])
        return found
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    what = f"{pattern}: No such file{nearest(path.name, siblings)}"
    raise ConfigErrors([Problem(key, what, _looked_for_in(path))])


def _looked_for_in(path: Path) -> str:
    """Where a file or a pattern was looked for, and what would be right."""
    folder = path.parent.absolute()
    there = folder.is_dir() or glob.has_magic(str(folder))
    where = f"it was looked for in {folder}" if there else f"there is no folder {folder}"
    return f"{where}: name a file that is there"


def _parts(source: Source, layout: Mapping[str, Any]) -> Iterator[tuple[str, Dataset]]:
    for path in source.paths:
        with _told_of(source.key):
            yield path, load_file(path, _layout(path, layout, source.key))


@contextmanager
def _told_of(key: str) -> Iterator[None]:
    """Names the config's key in what is said of a file."""
    try:
        yield
    except ConfigErrors:
        raise
    except UserError as error:
        raise ConfigErrors([Problem(key, str(error))]) from None


def _mixed(source: Source, layout: Mapping[str, Any], seed: int) -> Dataset:
    return mixing.mix([part for _, part in _parts(source, layout)], source.weights, seed)


def _hold_out(source: Source, path: str, rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        fix = "give data.eval a file of its own"
        raise ConfigErrors([Problem(source.key, f"{path} has one row, so none can be held out", fix)])
    return mixing.hold_out(rows, fraction, seed)


def _stream(source: Source, layout: Mapping[str, Any], seed: int) -> IterableDataset:
    """The rows as they are read, shuffled among those that are near; with weights drawn in these shares."""
    from datasets import IterableDataset, concatenate_datasets, interleave_datasets

    layouts = [_layout(path, layout, source.key) for path in source.paths]
    documents = any(each.format == "text" and each.unit == "file" for each in layouts)
    if documents and source.weights is not None:
        fix = "mix them by data.unit=paragraph or line"
        raise ConfigErrors([Problem(source.key, "streamed documents can't be mixed by weight", fix)])
    if any(each.format == "parquet" for each in layouts):
        fix = "data=hub data.name=parquet streams them"
        raise ConfigErrors([Problem("data.streaming", "Parquet files are read as they are needed anyway", fix)])
    parts = [
        IterableDataset.from_generator(read, gen_kwargs={"path": path, "layout": each})
        for path, each in zip(source.paths, layouts, strict=True)
    ]
    for path, part in zip(source.paths, parts, strict=True):
        with _told_of(source.key):
            if next(iter(part), None) is None:
                raise UserError(f"{path} has no rows")
    if source.weights is not None:
        shares = [weight / sum(source.weights) for weight in source.weights]
        mixed = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    else:
        mixed = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return mixed if documents else mixed.shuffle(seed=seed, buffer_size=_SHUFFLED)
