"""Rows of a data set on a hub, or of a local folder with the same layout."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from datasets import (
    DatasetBuilder,
    DatasetDict,
    Features,
    Value,
    get_dataset_config_names,
    get_dataset_split_names,
    load_dataset_builder,
)
from datasets.config import DATASET_STATE_JSON_FILENAME
from datasets.exceptions import DatasetNotFoundError

from loraplus_hydra.data import mixing
from loraplus_hydra.data.cache import cache_folder, digest, file_digest
from loraplus_hydra.data.rows import ORIGIN, OURS, first_columns, with_columns, with_origin
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, nearest

_FRONT_MATTER = re.compile(r"\s*---[\r\n]+([\S\s]*?)[\r\n]+---(?:[\r\n]|$)")
_METADATA = ("README.md", ".huggingface.yaml")  # files that list the files of a data set
_SHOWN = 100  # maximum number of characters of a name in a message
_BUFFER = 1000  # number of streamed rows in the buffer that shuffles them


def load(
    name: str,
    config: str | None = None,
    *,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.05,
    revision: str | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load splits of the data set `name` as "train" and "eval".

    `config` is one of the data set's configs. Without `eval_split`, the share `eval_fraction` of the training split is
    held out, drawn with `seed`. At most `max_samples` rows of each split are used, drawn with `seed`. With `streaming`,
    the training rows are read when they are needed, `max_samples` are the first of them, and `eval_split` is required.
    Raises ConfigErrors for names that don't exist; the message has the valid names.
    """
    if streaming and eval_split is None:
        fix = "set a split for evaluation: data.eval_split=validation"
        raise ConfigErrors([Problem("data.eval_split", "rows can't be held out from streamed rows", fix)])
    # The same split for both is no oversight: it measures the loss on the training rows
    if eval_split not in (None, train_split) and _overlap(train_split, str(eval_split)):
        fix = "choose another, or null: then a share of the training rows is held out"
        what = f"'{eval_split}' has rows of data.train_split, '{train_split}'"
        raise ConfigErrors([Problem("data.eval_split", what, fix)])
    train = load_split(name, config, train_split, revision, streaming=streaming, key="data.train_split")
    if eval_split is not None:
        held_out = load_split(name, config, eval_split, revision, key="data.eval_split")
    elif len(train) < 2:
        raise ConfigErrors([Problem("data.train_split", f"'{train_split}' has fewer than two rows", "choose another")])
    else:
        train, held_out = mixing.hold_out(train, eval_fraction, seed)
    train, held_out = (mixing.draw(rows, max_samples, seed) for rows in (train, held_out))
    if streaming:  # shuffled last, because each epoch shuffles anew, and all epochs must have the same rows
        train = train.shuffle(seed=seed, buffer_size=_BUFFER)
    return DatasetDict(train=train, eval=held_out)


def _overlap(one: str, other: str) -> bool:
    """Return True if two splits, such as train, train[:90%] or train+test, surely share rows."""
    pairs = itertools.product(*([part.strip() for part in split.split("+")] for split in (one, other)))
    return any(a == b or a == b.partition("[")[0] or b == a.partition("[")[0] for a, b in pairs)


def _refuse_leading_out(folder: Path) -> None:
    """Raise ConfigErrors if a local data set's metadata lists files outside its folder."""
    for name in _METADATA:
        if not (file := folder / name).is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if name == "README.md":
            front = _FRONT_MATTER.match(text)
            text = front[1] if front else ""
        try:
            stored = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            fix = "correct its metadata, or load the files with data=jsonl, csv or parquet"
            raise ConfigErrors([Problem("data.name", f"{file} can't be read: {first_line(error)}", fix)]) from None
        for entry in _strings(stored.get("configs") if isinstance(stored, dict) else None):
            if "://" in entry or entry.startswith(("/", "~")) or ".." in Path(entry).parts:
                what = f"{file} lists '{entry}', which is outside the folder"
                raise ConfigErrors([Problem("data.name", what, "copy the file into the folder, or use data=jsonl")])


def _refuse_files_outside(builder: DatasetBuilder, name: str) -> None:
    """Raise ConfigErrors if one of a data set's files is not its own, links followed."""
    # The card is a stranger's text, and a path in it may also be one of this machine.
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not _is_inside(str(file), builder):
                what = f"{name} lists '{file}', which is outside the data set"
                fix = "use another data set, or load files that you trust with data=jsonl, csv or parquet"
                raise ConfigErrors([Problem("data.name", what, fix)])


def _is_inside(file: str, builder: DatasetBuilder) -> bool:
    base = str(builder.base_path or "")
    if builder.repo_id or "://" in base:
        start = f"hf://datasets/{builder.repo_id}@" if builder.repo_id else f"{base.rstrip('/')}/"
        return file.startswith(start) and ".." not in Path(file).parts
    folders = [Path(base).expanduser().absolute()]
    # In the hub's own cache, the files of datasets--NAME/snapshots/REVISION are links into datasets--NAME/blobs.
    if folders[0].parent.name == "snapshots" and folders[0].parents[1].name.startswith("datasets--"):
        folders.append(folders[0].parents[1] / "blobs")
    return "://" not in file and any(Path(file).resolve().is_relative_to(folder.resolve()) for folder in folders)


def _content(builder: DatasetBuilder) -> str:
    """Return hex digits that identify the content of a data set's files; empty if they are on a hub."""
    files = sorted(str(file) for each in (builder.config.data_files or {}).values() for file in each)
    return "" if any("://" in file for file in files) or not files else digest(*map(file_digest, files))


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and mappings."""
    # An alias is followed only once, because nested aliases could expand without limit.
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, (list, dict)) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one


def load_split(
    name: str, config: str | None, split: str, revision: str | None, *, streaming: bool = False, key: str
) -> Any:
    """Load one split, with the column ORIGIN.

    `key` is the config's key that sets the split. Returns a Dataset, or with `streaming` an IterableDataset. Raises
    ConfigErrors.
    """
    try:
        _refuse_saved(name)
        _refuse_leading_out(Path(name))
    except OSError as error:  # a name that is too long, or a folder that can't be read
        what, fix = f"{name[:_SHOWN]} can't be read: {first_line(error)[:_SHOWN]}", "give a folder, or owner/name"
        raise ConfigErrors([Problem("data.name", what, fix)]) from None
    rows = _split(name, config, split, revision, streaming, key)
    if reserved := [column for column in rows.column_names or () if column in OURS]:
        raise ConfigErrors(
            [Problem("data.name", f"{name} has a column '{reserved[0]}', a name reserved for this program")]
        )
    source = f"{name}/{config}[{split}]" if config else f"{name}[{split}]"
    if streaming:
        features = rows.features and Features({**rows.features, ORIGIN: Value("string")})
        rows = rows.map(_add_origin, with_indices=True, fn_kwargs={"source": source}, features=features)
        return rows if features else with_columns(rows, first_columns(rows))
    if len(rows) == 0:
        raise ConfigErrors([Problem(key, f"'{split}' has no rows", "choose another split")])
    return with_origin(rows, source, digest(rows._fingerprint, source))


def _refuse_saved(name: str) -> None:
    """Raise ConfigErrors for a folder of `save_to_disk`, which is no data set of the hub."""
    if Path(name, DATASET_STATE_JSON_FILENAME).exists():
        fix = f"load its files: data=parquet data.format=arrow data.train='{name}/*.arrow'"
        raise ConfigErrors([Problem("data.name", f"{name} was saved by save_to_disk", fix)])


def _split(name: str, config: str | None, split: str, revision: str | None, streaming: bool, key: str) -> Any:
    try:
        # Not load_dataset, which would list the files again, so they could be others than the checked ones.
        builder = load_dataset_builder(name, config, revision=revision)
        _refuse_files_outside(builder, name)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        if content := _content(builder):
            # A folder for each content: datasets knows a file only by its name and time, and a copy can keep the time.
            builder = load_dataset_builder(name, config, revision=revision, cache_dir=str(cache_folder() / content))
            _refuse_files_outside(builder, name)
        builder.download_and_prepare()
        rows: Any = builder.as_dataset(split=split)
        if content:
            rows._fingerprint = digest(rows._fingerprint, content)
        return rows
    except ConfigErrors:
        raise
    except DatasetNotFoundError as error:
        fix = "use a data set on the hub (owner/name), or a folder; for single files use data=jsonl, csv or parquet"
        raise ConfigErrors([Problem("data.name", first_line(error), fix)]) from None
    except ValueError as error:  # the config or the split doesn't exist
        raise ConfigErrors([_wrong_name(error, name, config, split, revision, key)]) from None
    except Exception as error:  # the network, the files and their readers raise many types
        cause = error.__cause__ or error
        fix = "use a folder, or a data set on the hub, which needs the network for its first use"
        raise ConfigErrors([Problem("data.name", f"{name} can't be read: {first_line(cause)}", fix)]) from None


def _add_origin(row: dict[str, Any], index: int, source: str) -> dict[str, Any]:
    return {**row, ORIGIN: f"{source}, row {index + 1}"}


def _wrong_name(error: Exception, name: str, config: str | None, split: str, revision: str | None, key: str) -> Problem:
    """Return a Problem for a `config` or `split` that doesn't exist, with the valid names."""
    with suppress(Exception):  # if the names can't be listed either, the first error is reported
        configs = get_dataset_config_names(name, revision=revision)
        if (config is None and len(configs) > 1) or (config is not None and config not in configs):
            what = "is not set" if config is None else f"{name} has no '{config}'{nearest(config, configs)}"
            return Problem("data.config", what, f"use one of {', '.join(configs)}")
        splits = get_dataset_split_names(name, config, revision=revision)
        if split not in splits:
            what = f"{name} has no split '{split}'{nearest(split, splits)}"
            return Problem(key, what, f"use one of {', '.join(splits)}")
    return Problem("data.name", first_line(error))
