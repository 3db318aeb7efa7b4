"""Rows from a data set on a hub, or from a folder that is laid out like one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplus_hydra.data import mixing
from loraplus_hydra.data.cache import digest
from loraplus_hydra.data.rows import ORIGIN, OURS
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset


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
    """Splits of the data set `name` (`config` names one of its parts) as a DatasetDict of "train" and "eval".

    Without `eval_split` the share `eval_fraction` of the training split is held out, drawn by `seed`. `max_samples`
    rows of each at most, drawn by `seed`. `streaming` reads the training rows as they are needed; `eval_split` must
    then be given. Raises ConfigErrors for what isn't there, with what is.
    """
    from datasets import DatasetDict

    if streaming and eval_split is None:
        fix = "name a split to evaluate on: data.eval_split=validation"
        raise ConfigErrors([Problem("data.eval_split", "of streamed rows none can be held out", fix)])
    wanted = {"train": train_split} | ({"eval": eval_split} if eval_split else {})
    found = {
        key: load_split(name, config, split, revision, streaming=streaming and key == "train", key=f"data.{key}_split")
        for key, split in wanted.items()
    }
    if streaming:
        shuffled = found["train"].shuffle(seed=seed, buffer_size=1000)
        rows = DatasetDict(train=shuffled if max_samples is None else shuffled.take(max_samples))
        rows["eval"] = mixing.draw(found["eval"], max_samples, seed)
        return rows
    if eval_split is None:
        if len(found["train"]) < 2:
            raise ConfigErrors(
                [Problem("data.train_split", f"'{train_split}' has fewer than two rows", "name another")]
            )
        found["train"], found["eval"] = mixing.hold_out(found["train"], eval_fraction, seed)
    return DatasetDict({key: mixing.draw(rows, max_samples, seed) for key, rows in found.items()})


def load_split(
    name: str, config: str | None, split: str, revision: str | None, *, streaming: bool = False, key: str
) -> Dataset | IterableDataset | Any:
    """One split with the column ORIGIN; `key` is the config's key that named the split."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except DatasetNotFoundError as error:
        fix = "name a data set on the hub (owner/name), or a folder; for single files: data=jsonl, csv or parquet"
        raise ConfigErrors([Problem("data.name", first_line(error), fix)]) from None
    except ValueError as error:  # no such config, or no such split
        raise ConfigErrors([_named_wrongly(error, name, config, split, revision, key)]) from None
    except Exception as error:  # whatever the network, the files or their readers raise
        cause = error.__cause__ or error
        fix = "name a folder, or a data set on the hub: that needs the network once"
        raise ConfigErrors([Problem("data.name", f"{name} can't be read: {first_line(cause)}", fix)]) from None
    if reserved := [column for column in rows.column_names or () if column in OURS]:
        raise ConfigErrors([Problem("data.name", f"{name} has a column '{reserved[0]}', a name of our own")])
    title = f"{name}/{config}" if config else name
    if streaming:
        return rows.map(_with_origin, with_indices=True, fn_kwargs={"title": f"{title}[{split}]"})
    if len(rows) == 0:
        raise ConfigErrors([Problem(key, f"'{split}' has no rows", "name another split")])
    import pyarrow as pa

    places = pa.array((f"{title}[{split}], row {number}" for number in range(1, len(rows) + 1)), type=pa.string())
    return rows.add_column(ORIGIN, places, new_fingerprint=digest(rows._fingerprint, title, split))


def _with_origin(row: dict[str, Any], index: int, title: str) -> dict[str, Any]:
    return {**row, ORIGIN: f"{title}, row {index + 1}"}


def _named_wrongly(
    error: Exception, name: str, config: str | None, split: str, revision: str | None, key: str
) -> Problem:
    """Which of `config` and `split` isn't there, and what is."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    try:
        configs = get_dataset_config_names(name, revision=revision)
        if (config is None and len(configs) > 1) or (config is not None and config not in configs):
            what = "is not set" if config is None else f"{name} has no '{config}'{nearest(config, configs)}"
            return Problem("data.config", what, f"one of: {', '.join(configs)}")
        splits = get_dataset_split_names(name, config, revision=revision)
        if split not in splits:
            return Problem(
                key, f"{name} has no split '{split}'{nearest(split, splits)}", f"one of: {', '.join(splits)}"
            )
    except Exception:  # the data set can't even be listed: what was said first stands
        return Problem("data.name", first_line(error))
    return Problem("data.name", first_line(error))
