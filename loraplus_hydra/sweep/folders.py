"""A job's folder in a sweep: its name, and whether what lies there is the job's own, done or left unfinished.

Hydra writes into a job's folder before it calls us. So the folder's name, and whether Hydra may write there at all, are
values of its own config that `conf/app.yaml` asks for by the interpolations registered here.
"""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.config.hydra_job import is_sweep
from loraplus_hydra.config.identity import config_hash, run_hash
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.io import files, run_folder
from loraplus_hydra.io.read import Unreadable, read_yaml
from loraplus_hydra.io.result import OK, read_result
from loraplus_hydra.sweep.names import HASH_DIGITS, job_name

LOG = "sweep.log"  # what is said of jobs whose folders are left alone
_WRITTEN = (
    run_folder.CONFIG,
    run_folder.PARAM_GROUPS,
    run_folder.METRICS,
    run_folder.RESULT,
    run_folder.FIGURE,
    run_folder.ADAPTER,
    run_folder.CHECKPOINTS,
)


class State(Enum):
    """What lies in a job's folder."""

    FREE = "nothing of a run"
    LEFT = "what is left of this very job"
    DONE = "this very job, done"
    TAKEN = "another config's run"


def register() -> None:
    """Make the interpolations of `conf/app.yaml` known; every process that runs jobs does so by importing `cli`."""
    for name, resolver in (
        ("job_folder", _job_folder),
        ("hydra_folder", _hydra_folder),
        ("log_file", _log_file),
    ):
        OmegaConf.register_new_resolver(f"loraplus.{name}", resolver, replace=True)


def state_of(folder: Path, wanted: str) -> State:
    """What lies in `folder` for a job whose config has the hash `wanted`."""
    result = read_result(folder)
    stored = (result.config_hash if result is not None else "") or _hash_of_file(folder / run_folder.CONFIG)
    if stored is None:
        return State.LEFT if any((folder / name).exists() for name in _WRITTEN) else State.FREE
    if stored != wanted:
        return State.TAKEN
    return State.DONE if result is not None and result.status == OK else State.LEFT


def hash_of(config: DictConfig) -> str:
    """The hash of a run's config; of one with values that can't be read, the hash of what it says instead."""
    try:
        return run_hash(config)
    except OmegaConfBaseException:
        return config_hash(OmegaConf.to_container(config, resolve=False))


def clear(folder: Path) -> None:
    """Remove what an unfinished run has left in `folder`, but its log; files that no run writes stay."""
    for name in _WRITTEN:
        place = folder / name
        for path in (place, files.unfinished(place), place.with_name(f".{name}.old")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _hash_of_file(file: Path) -> str | None:
    """The hash of a stored config; None where there is none to be read."""
    try:
        return hash_of(OmegaConf.create(read_yaml(file)))
    except (Unreadable, OmegaConfBaseException):
        return None


def _job_folder(*, _root_: DictConfig) -> str:
    """hydra.sweep.subdir"""
    digits = hash_of(run_of(_root_))
    swept = _root_.hydra.callbacks.before_run.swept
    name = job_name({key: _value(_root_, key) for key in swept}, digits)
    # A sweep over other keys may have had this very job, under a name that says those.
    there = sorted(Path(_root_.hydra.sweep.dir).glob(f"*_{digits[:HASH_DIGITS]}"))
    return there[0].name if there else name


def _hydra_folder(*, _root_: DictConfig) -> str | None:
    """hydra.output_subdir: none where Hydra is to leave the folder alone."""
    return None if _is_left_alone(_root_) else run_folder.HYDRA


def _log_file(*, _root_: DictConfig) -> str:
    """The file that the job's log goes to."""
    hydra = _root_.hydra
    if _is_left_alone(_root_):
        return str(Path(hydra.sweep.dir).absolute() / LOG)
    return f"{hydra.runtime.output_dir}/{hydra.job.name}.log"


def _is_left_alone(root: DictConfig) -> bool:
    if not is_sweep(root.hydra):
        return False
    return state_of(Path(root.hydra.runtime.output_dir), hash_of(run_of(root))) in (State.DONE, State.TAKEN)


def _value(root: DictConfig, key: str) -> Any:
    """A swept key's value: a group's option, or what stands in the config, or else what the override says."""
    choices = root.hydra.runtime.choices
    if key in choices:
        return choices[key]
    try:
        value = OmegaConf.select(root, key, default=_MISSING)
    except OmegaConfBaseException:
        value = _MISSING
    if value is _MISSING:
        texts: Any = OmegaConf.to_container(root.hydra.overrides.task, resolve=False)
        words = (str(text).lstrip("+").partition("=") for text in texts)
        return next((text for name, _, text in words if name == key), None)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


_MISSING = object()
