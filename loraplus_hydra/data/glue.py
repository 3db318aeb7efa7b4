"""The GLUE benchmark, from a hub or from a folder of the original TSV files.

Rows have the columns "text", "text_pair" and "label". For tasks with single sentences "text_pair" is null. Labels have
the hub's names, in the hub's order. https://gluebenchmark.com/tasks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from loraplus_hydra.config.locations import expanded, is_local
from loraplus_hydra.data import mixing
from loraplus_hydra.data.cache import file_digest, generate_cached
from loraplus_hydra.data.hub import load_split
from loraplus_hydra.data.rows import ORIGIN
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, errors_at, nearest


@dataclass(frozen=True)
class GlueTask:
    """One task's layout, in the original files and on the hub."""

    folder: str
    columns: tuple[str, ...]  # the TSV's columns with the text, or with the text and its pair
    label: str  # the TSV's column with the label
    labels: tuple[str, ...] | None  # names in the hub's order; None: a number
    hub_columns: tuple[str, ...]
    names_in_file: bool = False  # True if the TSV has the labels' names instead of their numbers
    header: tuple[str, ...] | None = None  # the columns' names, for files without a header


_SENTENCE, _SENTENCES, _QUESTIONS = ("sentence",), ("sentence1", "sentence2"), ("question1", "question2")
_ANSWERED = ("question", "sentence")
_VERDICTS = ("entailment", "neutral", "contradiction")
_ENTAILED = ("entailment", "not_entailment")
_COLA_HEADER = ("source", "label", "judgement", "sentence")

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask("CoLA", _SENTENCE, "label", ("unacceptable", "acceptable"), _SENTENCE, header=_COLA_HEADER),
    "sst2": GlueTask("SST-2", _SENTENCE, "label", ("negative", "positive"), _SENTENCE),
    "mnli": GlueTask("MNLI", _SENTENCES, "gold_label", _VERDICTS, ("premise", "hypothesis"), names_in_file=True),
    "qqp": GlueTask("QQP", _QUESTIONS, "is_duplicate", ("not_duplicate", "duplicate"), _QUESTIONS),
    "qnli": GlueTask("QNLI", _ANSWERED, "label", _ENTAILED, _ANSWERED, names_in_file=True),
    "rte": GlueTask("RTE", _SENTENCES, "label", _ENTAILED, _SENTENCES, names_in_file=True),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"), _SENTENCES),
    "stsb": GlueTask("STS-B", _SENTENCES, "score", None, _SENTENCES),
    "wnli": GlueTask("WNLI", _SENTENCES, "label", _ENTAILED[::-1], _SENTENCES),
}


def load(
    name: str,
    path: str = "nyu-mll/glue",
    *,
    matched: bool = True,
    revision: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load the training and development rows of the GLUE task `name` as "train" and "eval".

    `path` is a data set on a hub, the task's folder, or a folder with a folder for each task (CoLA, SST-2, ...). MNLI
    is evaluated on the genres of its training rows; with `matched=False`, on other genres. At most `max_samples` rows
    of each split are used, drawn with `seed`. Test sets are not used, because their labels are not public. Raises
    ConfigErrors for names and files that don't exist, and for rows that can't be read.
    """
    if name not in TASKS:
        fix = f"use one of {', '.join(TASKS)}"
        raise ConfigErrors([Problem("data.name", f"GLUE has no task '{name}'{nearest(str(name), TASKS)}", fix)])
    task = TASKS[name]
    suffix = ("_matched" if matched else "_mismatched") if name == "mnli" else ""
    if is_local(path):
        folder = _folder(expanded(path), task)
        rows = {"train": _local(folder / "train.tsv", task), "eval": _local(folder / f"dev{suffix}.tsv", task)}
    else:
        splits = {"train": "train", "eval": f"validation{suffix}"}
        loaded = {key: load_split(path, name, split, revision, key="data.path") for key, split in splits.items()}
        rows = {key: _rename_columns(split, task) for key, split in loaded.items()}
    return DatasetDict({key: mixing.draw(split, max_samples, seed) for key, split in rows.items()})


def _folder(path: Path, task: GlueTask) -> Path:
    if not path.is_dir():
        fix = f"give a folder that contains {task.folder}/train.tsv"
        raise ConfigErrors([Problem("data.path", f"{path}: no such folder", fix)])
    inside = path / task.folder
    return inside if inside.is_dir() else path


def _local(path: Path, task: GlueTask) -> Dataset:
    with errors_at("data.path"):
        # All rows are read once in advance, because datasets would wrap their errors.
        if sum(1 for _ in read_tsv(str(path), task)) == 0:
            raise UserError(f"{path} has no rows")
    key = {"glue": task.folder, "path": str(path), "content": file_digest(path)}
    return generate_cached(read_tsv, {"path": str(path), "task": task}, features=_features(task), key=key)


def read_tsv(path: str, task: GlueTask) -> Iterator[dict[str, Any]]:
    """Yield the rows of an original file. Quotes have no special meaning in it.

    Rows with missing cells (QQP has a few) and MNLI's rows without a verdict (`-`) are omitted, as is usual. Raises
    UserError with the line.
    """
    names: Sequence[str] | None = task.header
    for place, cells in _read_cells(path):
        if names is None:
            names = cells
            _check_columns(place, names, task)
            continue
        row = dict(zip(names, cells, strict=False))
        if len(row) == len(names) and row[task.label] != "-":
            text, pair = (*(row[column] for column in task.columns), None)[:2]
            yield {"text": text, "text_pair": pair, "label": _label(row[task.label], task, place), ORIGIN: place}


def _read_cells(path: str) -> Iterator[tuple[str, list[str]]]:
    try:
        # Only \n ends a row, because sentences contain other line ends.
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line.rstrip("\r\n").split("\t")
    except UnicodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _check_columns(place: str, names: Sequence[str], task: GlueTask) -> None:
    missing = [column for column in (*task.columns, task.label) if column not in names]
    if missing:
        raise UserError(f"{place}: there is no column '{missing[0]}'; the columns are {', '.join(names)}")


def _label(text: str, task: GlueTask, place: str) -> int | float:
    try:
        if task.labels is None:
            return float(text)
        number = task.labels.index(text) if task.names_in_file else int(text)
        if 0 <= number < len(task.labels):
            return number
    except ValueError:
        pass
    allowed = "a number" if task.labels is None else ", ".join(task.labels if task.names_in_file else ("0", "1"))
    raise UserError(f"{place}: the label '{text}' is not {'' if task.labels is None else 'one of '}{allowed}")


def _features(task: GlueTask) -> Features:
    label = Value("float64") if task.labels is None else ClassLabel(names=list(task.labels))
    pair = Value("string") if len(task.columns) > 1 else Value("null")
    return Features({"text": Value("string"), "text_pair": pair, "label": label, ORIGIN: Value("string")})


def _rename_columns(rows: Dataset, task: GlueTask) -> Dataset:
    rows = rows.select_columns([*task.hub_columns, "label", ORIGIN])
    rows = rows.rename_columns(dict(zip(task.hub_columns, ("text", "text_pair"), strict=False)))
    return rows if len(task.hub_columns) > 1 else rows.add_column("text_pair", pa.nulls(len(rows)))
