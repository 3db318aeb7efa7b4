"""Local paths in a run's config. config.yaml has them as absolute paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.plain import plain_at

# Keys whose value can be a local path. A run stores absolute paths, because it may be opened from another folder.
PATH_KEYS = ("model.path", "model.tokenizer", "adapter.path", "data.train", "data.eval", "forgetting")


def with_absolute_paths(config: DictConfig) -> DictConfig:
    """Return a copy of a run's config in which each existing relative path is absolute, as in config.yaml."""
    copy = config.copy()
    for key in PATH_KEYS:
        value = plain_at(config, key)
        if (stored := absolute(value)) != value:
            OmegaConf.update(copy, key, stored, merge=False)
    return copy


def absolute(value: Any) -> Any:
    """Return a value of PATH_KEYS with absolute paths where they exist. It may be a list of paths."""
    if isinstance(value, list):
        return [absolute(item) for item in value]
    try:
        exists = isinstance(value, str) and value != "" and Path(value).exists()
    except (OSError, ValueError):  # not a valid path
        exists = False
    return str(Path(value).absolute()) if exists else value


def is_absolute_of(absolute: Any, relative: Any) -> bool:
    """Return True if `absolute` is the path `relative` in some folder. Both may be lists of paths."""
    if isinstance(absolute, list) and isinstance(relative, list):
        return len(absolute) == len(relative) and all(map(is_absolute_of, absolute, relative))
    if not (isinstance(absolute, str) and isinstance(relative, str)):
        return False
    tail, parts = Path(relative).parts, Path(absolute).parts
    return absolute == relative or (Path(absolute).is_absolute() and parts[-len(tail) :] == tail)
