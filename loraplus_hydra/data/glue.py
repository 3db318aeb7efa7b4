"""The GLUE benchmark by task name: from a hub, or from a folder of the original TSV files.

Rows have the columns "text", "text_pair" and "label"; a task of single sentences has no value in "text_pair". Labels
are named as on the hub, and in its order. https://gluebenchmark.com/tasks
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra.config.locations import is_local
from loraplus_hydra.data import mixing
from loraplus_hydra.data.cache import file_digest, generated
from loraplus_hydra.data.hub import load_split
from loraplus_hydra.data.rows import ORIGIN
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features


@dataclass(frozen=True)
class GlueTask:
    """How one task lies in the original files and on the hub."""

    folder: str
    columns: tuple[str, ...]  # of the TSV: text, or text and its pair
    label: str  # column of the TSV
    labels: tuple[str, ...] | None  # names in the hub's order; None: a number
    hub_columns: tuple[str, ...]
    names_in_file: bool = False  # the TSV has the labels' names, not their numbers
    header: tuple[str, ...] | None = None  # of files that have none


TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        ("sentence",),
        header=("source", "label", "judgement", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("negative", "positive"), ("sentence",)),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("premise", "hypothesis"),
        names_in_file=True,
    ),
    "qqp": GlueTask(
        "QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"), ("question1", "question2")
    ),
    "qnli": GlueTask(
        "QNLI",
        ("question", "sentence"),
        "label",
        ("entailment", "not_entailment"),
        ("question", "sentence"),
        names_in_file=True,
    ),
    "rte": GlueTask(
        "RTE",
        ("sentence1", "sentence2"),
        "label",
        ("entailment", "not_entailment"),
        ("sentence1", "sentence2"),
        names_in_file=True,
    ),
    "mrpc": GlueTask(
        "MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"), ("sentence1", "sentence2")
    ),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), "score", None, ("sentence1", "sentence2")),
    "wnli": GlueTask(
        "WNLI", ("sentence1", "sentence2"), "label", ("not_entailment", "entailment"), ("sentence1", "sentence2")
    ),
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
    """The training and development rows of the GLUE task `name` as "train" and "eval".

    `path` is a data set on a hub or a folder: that of all tasks (with CoLA, SST-2, ... in it) or the task's own. MNLI
    is evaluated on the genres it was trained on, or with `matched=False` on others. `max_samples` rows of each at most,
    drawn by `seed`. Test sets have no public labels. Raises ConfigErrors for what isn't there or isn't as it should be.
    """
    from datasets import DatasetDict

    if name not in TASKS:
        fix = f"one of: {', '.join(TASKS)}"
        raise ConfigErrors([Problem("data.name", f"GLUE has no task '{name}'{nearest(str(name), TASKS)}", fix)])
    task = TASKS[name]
    suffix = ("_matched" if matched else "_mismatched") if name == "mnli" else ""
    if is_local(path):
        folder = _folder(Path(path).expanduser(), task)
        rows = {"train": _local(folder / "train.tsv", task), "eval": _local(folder / f"dev{suffix}.tsv", task)}
    else:
        splits = {"train": "train", "eval": f"validation{suffix}"}
        loaded = {key: load_split(path, name, split, revision, key="data.path") for key, split in splits.items()}
        rows = {key: _as_ours(split, task) for key, split in loaded.items()}
    return DatasetDict({key: mixing.draw(split, max_samples, seed) for key, split in rows.items()})


def _folder(path: Path, task: GlueTask) -> Path:
    if not path.is_dir():
        raise ConfigErrors(
            [Problem("data.path", f"{path}: no such folder", f"a folder with {task.folder}/train.tsv in it")]
        )
    inside = path / task.folder
    return inside if inside.is_dir() else path


def _local(path: Path, task: GlueTask) -> Dataset:
    try:
        count = sum(1 for _ in read_tsv(str(path), task))
    except UserError as error:
        raise ConfigErrors([Problem("data.path", str(error))]) from None
    if count == 0:
        raise ConfigErrors([Problem("data.path", f"{path} has no rows")])
    key = {"glue": task.folder, "path": str(path), "content": file_digest(path)}
    return generated(read_tsv, {"path": str(path), "task": task}, features=_features(task), key=key)


def read_tsv(path: str, task: GlueTask) -> Iterator[dict[str, Any]]:
    """The rows of one of the original files, in which quotes mean nothing.

    Rows with cells missing, of which QQP has a few, and MNLI's without a verdict (`-`) are left out, as everybody does.
    """
    names: list[str] | None = list(task.header) if task.header else None
    try:
        # Other line ends stand inside sentences: a row ends at \n alone.
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                cells = line.rstrip("\r\n").split("\t")
                if names is None:
                    names = cells
                    _check_columns(path, names, task)
                    continue
                row = dict(zip(names, cells, strict=False))
                if len(row) < len(names) or row[task.label] == "-":
                    continue
                place = f"{path}, line {number}"
                texts = [row[column] for column in task.columns]
                yield {
                    "text": texts[0],
                    "text_pair": texts[1] if len(texts) > 1 else None,
                    "label": _label(row[task.label], task, place),
                    ORIGIN: place,
                }
    except UnicodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _check_columns(path: str, names: list[str], task: GlueTask) -> None:
    missing = [column for column in (*task.columns, task.label) if column not in names]
    if missing:
        raise UserError(f"{path}, line 1: no column '{missing[0]}'; there are: {', '.join(names)}")


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
    from datasets import ClassLabel, Features, Value

    label = Value("float64") if task.labels is None else ClassLabel(names=list(task.labels))
    pair = Value("string") if len(task.columns) > 1 else Value("null")
    return Features({"text": Value("string"), "text_pair": pair, "label": label, ORIGIN: Value("string")})


def _as_ours(rows: Dataset, task: GlueTask) -> Dataset:
    """A split of the hub's with our columns."""
    rows = rows.select_columns([*task.hub_columns, "label", ORIGIN])
    rows = rows.rename_columns(dict(zip(task.hub_columns, ("text", "text_pair"), strict=False)))
    if len(task.hub_columns) == 1:
        import pyarrow as pa

        rows = rows.add_column("text_pair", pa.nulls(len(rows)))
    return rows
