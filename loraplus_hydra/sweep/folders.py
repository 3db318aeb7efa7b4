"""The name of a job's folder, and the state of the run in the folder.

Hydra writes into a job's folder before it calls this program. So two values of Hydra's config must be computed earlier:
the folder's name, and whether Hydra may write there. `conf/app.yaml` gets these values from the interpolations that
this module registers.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.config.hydra_job import is_sweep
from loraplus_hydra.config.identity import config_hash, run_hash
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.config.stored_paths import with_absolute_paths
from loraplus_hydra.io import folders, run_folder
from loraplus_hydra.io.read import Unreadable, read_yaml
from loraplus_hydra.io.result import OK, read_result
from loraplus_hydra.models import published_rate
from loraplus_hydra.sweep.names import HASH_DIGITS, job_name

LOG = "sweep.log"  # in the sweep's folder: the log of jobs whose own folders must not change
_MISSING = object()


class State(Enum):
    """The state of a job's folder."""

    FREE = "no run"
    LEFT = "this job, incomplete"
    DONE = "this job, done"
    TAKEN = "another config's run"


def register() -> None:
    """Register the interpolations of `conf/app.yaml`. `cli` calls this on import, also in workers."""
    OmegaConf.register_new_resolver("loraplus.job_folder", _job_folder, replace=True)
    OmegaConf.register_new_resolver("loraplus.hydra_folder", _hydra_folder, replace=True)
    OmegaConf.register_new_resolver("loraplus.log_file", _log_file, replace=True)
    published_rate.register()


def folder_state(folder: Path, config: DictConfig) -> State:
    """Return the state of `folder` for the job with the run's config `config`."""
    result, job_hash = read_result(folder), hash_of(config)
    if result is not None and result.config_hash:
        is_own = result.config_hash == job_hash
    elif (stored := _hash_of_file(folder / run_folder.CONFIG)) is not None:  # killed in its first start
        is_own = stored in (job_hash, _stored_hash(config))
    else:
        return State.LEFT if any((folder / name).exists() for name in run_folder.WRITTEN) else State.FREE
    if not is_own:
        return State.TAKEN
    return State.DONE if result is not None and result.status == OK else State.LEFT


def hash_of(config: DictConfig) -> str:
    """Return the hash of a run's config. If an interpolation fails, the unresolved config is hashed."""
    try:
        return run_hash(config)
    except OmegaConfBaseException:
        return config_hash(OmegaConf.to_container(config, resolve=False))


def clear(folder: Path) -> None:
    """Remove the files of an incomplete run from `folder`.

    The log is kept, and so are files that a run doesn't write.
    """
    for name in run_folder.WRITTEN:
        folders.remove(folder / name)
    folders.remove_drafts(folder)


def _stored_hash(config: DictConfig) -> str | None:
    """Return the hash that the job's config.yaml has, whose paths are absolute."""
    try:
        return hash_of(with_absolute_paths(config))
    except OmegaConfBaseException:
        return None


def _hash_of_file(file: Path) -> str | None:
    try:
        return hash_of(OmegaConf.create(read_yaml(file)))
    except (Unreadable, OmegaConfBaseException):
        return None


def _job_folder(*, _root_: DictConfig) -> str:
    """Return the value of hydra.sweep.subdir."""
    digits = hash_of(run_of(_root_))
    name = job_name({key: _swept_value(_root_, key) for key in _root_.sweep.swept}, digits)
    # A sweep over other keys may have run the same job, in a folder with the names of these keys.
    existing = sorted(Path(_root_.hydra.sweep.dir).glob(f"*_{digits[:HASH_DIGITS]}"))
    return existing[0].name if existing else name


def _hydra_folder(*, _root_: DictConfig) -> str | None:
    """Return the value of hydra.output_subdir. With None, Hydra writes no files."""
    return None if _is_kept(_root_) else run_folder.HYDRA


def _log_file(*, _root_: DictConfig) -> str:
    """Return the path of the job's log file."""
    hydra = _root_.hydra
    if _is_kept(_root_):
        return str(Path(hydra.sweep.dir).absolute() / LOG)
    return f"{hydra.runtime.output_dir}/{hydra.job.name}.log"


def _is_kept(root: DictConfig) -> bool:
    """Return True if the job's folder must not change."""
    if not is_sweep(root.hydra):
        return False
    return folder_state(Path(root.hydra.runtime.output_dir), run_of(root)) in (State.DONE, State.TAKEN)


def _swept_value(root: DictConfig, key: str) -> Any:
    choices = root.hydra.runtime.choices
    if key in choices:  # the key is a group, so its value is the option
        return choices[key]
    try:
        value = OmegaConf.select(root, key, default=_MISSING)
    except OmegaConfBaseException:
        value = _MISSING
    if value is not _MISSING:
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    # If the config has no readable value, the override's text is used.
    texts: Any = OmegaConf.to_container(root.hydra.overrides.task, resolve=False)
    parts = (str(text).lstrip("+").partition("=") for text in texts)
    return next((text for name, _, text in parts if name == key), None)
