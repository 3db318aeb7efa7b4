"""The config for a resumed run: the stored config with the command's changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.config.identity import ALLOW
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import RUN_GROUPS
from loraplus_hydra.config.stored_paths import PATH_KEYS, absolute, is_absolute_of
from loraplus_hydra.errors import ConfigErrors, Problem, first_line
from loraplus_hydra.io import run_folder
from loraplus_hydra.io.checkpoints import AUTO, ResumePoint, newest_complete
from loraplus_hydra.io.files import found_at
from loraplus_hydra.io.folders import refuse_foreign
from loraplus_hydra.io.read import read_bytes
from loraplus_hydra.runs.new_rows import named_rows
from loraplus_hydra.runs.stored_config import KEY, read_plain, read_stored


def resumed_config(folder: Path, config: DictConfig) -> tuple[DictConfig, ResumePoint]:
    """Return the config of the run in `folder`, with the changes in the command's `config`.

    Also return the resume point, as far as it is known.
    """
    file = _stored_file(folder)
    run = read_stored(file, _changes(folder, file, config))
    if run.model.trust_remote_code and not config.trust_remote_code:
        what = "the run's model contains Python code (model.trust_remote_code)"
        raise ConfigErrors([Problem("trust_remote_code", what, "read the code, then set trust_remote_code=true")])
    start = run.trainer.get("resume_from_checkpoint")
    given, stored = plain_of(config.data, resolve=False), read_plain(folder / run_folder.CONFIG).get("data")
    point = ResumePoint(None, new_rows=named_rows(given, stored or {}, run.data))
    # A run that began from another run's checkpoint resumes from its own checkpoint if it has one.
    if start not in (None, AUTO) and config.trainer.get("resume_from_checkpoint") is None:
        checkpoint, messages = newest_complete(folder / run_folder.CHECKPOINTS)
        if checkpoint is not None:
            start, point = AUTO, replace(point, checkpoint=checkpoint, messages=messages)
    with open_dict(run):
        run.trainer.resume_from_checkpoint = start or AUTO
        run[ALLOW] = config[ALLOW]  # applies only to this command
    try:
        OmegaConf.to_container(run, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or KEY)
        raise ConfigErrors([Problem(key, first_line(error), f"see {file}")]) from None
    return run, point


def _stored_file(folder: Path) -> Path:
    """Return the file of the run's config: Hydra's copy or config.yaml.

    In Hydra's copy the rules still refer to loraplus.ratio. A run started from Python has no such copy. If another
    program composes this config into its own, the copy has another form.
    """
    if found_at(folder, KEY) is None or not folder.is_dir():
        raise ConfigErrors([Problem(KEY, f"there is no folder {folder}", "give the folder of an interrupted run")])
    if "${" in str(folder.absolute()):
        what = f"Hydra would read the '${{' in {folder} as an interpolation"
        raise ConfigErrors([Problem(KEY, what, "rename the folder")])
    refuse_foreign(folder, KEY)
    composed = _composed_file(folder)
    file = composed if _is_of_a_run(composed) else folder / run_folder.CONFIG
    if not file.is_file():
        what = f"{folder} is not a run's folder, because it has no {run_folder.CONFIG}"
        raise ConfigErrors([Problem(KEY, what, "give the folder of an interrupted run")])
    if not read_bytes(file).strip():
        fix = f"run its own command again, with hydra.run.dir={folder} trainer.resume_from_checkpoint=auto"
        raise ConfigErrors([Problem(KEY, f"the run in {folder} ended before it began: {file} is empty", fix)])
    return file


def _changes(folder: Path, file: Path, config: DictConfig) -> dict[str, Any]:
    """Return the changes for each config group: earlier resumes' changes, overridden by `config`."""
    # Interpolations are kept, because they may refer to keys that only the stored config has
    changes = {group: plain_of(config[group], resolve=False) for group in RUN_GROUPS if config[group]}
    if file == _composed_file(folder):
        merged = OmegaConf.merge(_earlier_changes(folder), changes)
        assert isinstance(merged, DictConfig)
        return plain_of(merged, resolve=False)
    if "loraplus" in changes:
        what = f"in {file} the rules have numbers instead of references to loraplus.ratio"
        raise ConfigErrors([Problem("loraplus", what, "don't change loraplus keys")])
    return changes


def _composed_file(folder: Path) -> Path:
    return folder / run_folder.HYDRA / run_folder.CONFIG


def _earlier_changes(folder: Path) -> dict[str, Any]:
    """Return the overrides of earlier resumes that are still in effect, by config group.

    So a run that got more steps, and is interrupted again, keeps these steps. The overrides are in effect if
    config.yaml has them.
    """
    in_effect = read_plain(folder / run_folder.CONFIG)
    found = OmegaConf.create()
    for file in sorted((folder / run_folder.HYDRA).glob(f"resumed-*/{run_folder.CONFIG}")):
        given = read_plain(file)
        found.merge_with(_common({group: given.get(group) for group in RUN_GROUPS}, in_effect))
    return plain_of(found, resolve=False)


def _common(given: Mapping[Any, Any], in_effect: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """Return the values of `given` that are also in `in_effect`, without interpolations.

    `in_effect` has the value of an interpolation, and the absolute path of a relative one.
    """
    common: dict[Any, Any] = {}
    for name, value in given.items():
        key, effective = f"{prefix}{name}", in_effect.get(name)
        # The keys of a mapping from paths to weights are paths
        if isinstance(value, Mapping) and isinstance(effective, Mapping) and key not in PATH_KEYS:
            if inner := _common(value, effective, f"{key}."):
                common[name] = inner
        elif name not in in_effect or "${" in str(effective):
            continue
        elif value == effective or (key in PATH_KEYS and absolute(value) == effective):
            common[name] = value  # also a relative path, because the run's hash is of the path as it was given
        elif "${" in str(value) or (key in PATH_KEYS and is_absolute_of(effective, value)):
            common[name] = effective
    return common


def _is_of_a_run(file: Path) -> bool:
    """Return True if Hydra's copy of a config is a run's config, or empty.

    False if it is the config of another program that composes a run's config.
    """
    if not file.is_file():
        return False
    text = read_bytes(file).decode("utf-8", errors="replace")
    return not text.strip() or all(re.search(rf"^{group}:", text, re.MULTILINE) for group in RUN_GROUPS)
