"""The config's `data` group -> rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraplus_hydra.build import instantiate
from loraplus_hydra.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict
    from omegaconf import DictConfig

COLUMN_SUFFIX = "_column"  # keys that say what the columns are called, read by the task


def loader_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without the `*_column` keys: what its `_target_` is called with."""
    return {str(key): data[key] for key in data if not str(key).endswith(COLUMN_SUFFIX)}


def load_rows(data: DictConfig) -> DatasetDict:
    """Call `data._target_`; raises UserError when what comes back isn't a DatasetDict with "train" and "eval" rows."""
    from datasets import DatasetDict

    rows = instantiate(loader_arguments(data))
    if not isinstance(rows, DatasetDict) or not {"train", "eval"} <= set(rows):
        found = f"splits {sorted(rows)}" if isinstance(rows, DatasetDict) else f"a {type(rows).__name__}"
        raise UserError(f"data._target_: {data._target_} returned {found}, not a DatasetDict with 'train' and 'eval'")
    for split in ("train", "eval"):
        if len(rows[split]) == 0:
            raise UserError(f"data: there are no rows in '{split}'")
    return rows
