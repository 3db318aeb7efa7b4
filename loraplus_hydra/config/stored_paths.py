"""Local paths in a run's config. config.yaml has them as absolute paths."""

from __future__ import annotations

import glob
import re
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
    """Return a value of PATH_KEYS with absolute paths, where they exist or, as patterns, match a file.

    It may be a list of paths, or a mapping from paths to weights.
    """
    if isinstance(value, list):
        return [absolute(item) for item in value]
    if isinstance(value, dict):
        return {absolute(path): weight for path, weight in value.items()}
    if not isinstance(value, str) or not value:
        return value
    try:
        if Path(value).exists():
            return str(Path(value).absolute())
        if glob.has_magic(value) and not Path(value).is_absolute() and any(glob.iglob(value, recursive=True)):
            return str(Path(glob.escape(str(Path.cwd())), value))  # the folder's own name may have brackets
    except (OSError, ValueError, re.error):  # not a valid path or pattern
        pass
    return value


def is_here(value: Any) -> bool:
    """Return True if each path of a value of PATH_KEYS is relative, and exists or matches a file."""
    paths = list(value) if isinstance(value, (list, dict)) else [value]
    return all(absolute(path) != path for path in paths)


def is_absolute_of(absolute: Any, relative: Any) -> bool:
    """Return True if `absolute` is the path `relative` in some folder.

    Both may be lists of paths, or mappings from paths to weights.
    """
    if isinstance(absolute, dict) and isinstance(relative, dict):
        return list(absolute.values()) == list(relative.values()) and is_absolute_of(list(absolute), list(relative))
    if isinstance(absolute, list) and isinstance(relative, list):
        return len(absolute) == len(relative) and all(map(is_absolute_of, absolute, relative))
    if not (isinstance(absolute, str) and isinstance(relative, str)):
        return False
    tail, parts = Path(relative).parts, Path(absolute).parts
    return absolute == relative or (Path(absolute).is_absolute() and parts[-len(tail) :] == tail)
