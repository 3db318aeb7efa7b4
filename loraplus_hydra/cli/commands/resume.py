"""`resume`: a run that was stopped goes on from its newest whole checkpoint, in its own folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.check import check
from loraplus_hydra.config.schema import RUN_GROUPS
from loraplus_hydra.errors import ConfigErrors, Problem, first_line
from loraplus_hydra.io import checkpoints, processes, run_folder
from loraplus_hydra.io.checkpoints import AUTO
from loraplus_hydra.io.files import refuse_unwritable
from loraplus_hydra.runs.finished import named_run
from loraplus_hydra.runs.resume import resume_point_or_exit
from loraplus_hydra.runs.stored_config import KEY, read_plain, read_stored


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Raise UserError when the run can't go on, before its folder is touched; end the program if it has finished."""
    run = resumed_config(config)
    check(run)
    folder = Path(named_run(config)).expanduser()
    resume_point_or_exit(run, folder)
    if processes.is_main():
        refuse_unwritable(folder, key=KEY)


def resumed_config(config: DictConfig) -> DictConfig:
    """The config of the run that `config.run` names, with the changes that `config` holds. Raises ConfigErrors.

    It is read as Hydra stored it, with its interpolations, so that a changed ratio reaches the rules; a run without
    that (made in Python, or by a program that composes ours) has its resolved config, in which only single values can
    be changed.
    """
    folder = Path(named_run(config)).expanduser()
    if not folder.is_dir():
        raise ConfigErrors([Problem(KEY, f"there is no folder {folder}", "name the folder of a run that was stopped")])
    if "${" in str(folder.absolute()):
        raise ConfigErrors([Problem(KEY, f"Hydra would follow the '${{' in {folder}", "give the folder another name")])
    asked = folder / run_folder.HYDRA / run_folder.CONFIG
    stored = asked if _is_of_a_run(asked) else folder / run_folder.CONFIG
    if not stored.is_file():
        what = f"{folder} is no run's folder: there is no {run_folder.CONFIG} in it"
        raise ConfigErrors([Problem(KEY, what, "name the folder of a run that was stopped")])
    if not stored.read_text(encoding="utf-8", errors="replace").strip():
        fix = f"give its own command again, with hydra.run.dir={folder} trainer.resume_from_checkpoint=auto"
        raise ConfigErrors([Problem(KEY, f"the run in {folder} was ended before it began: {stored} is empty", fix)])
    changes = {group: config[group] for group in RUN_GROUPS if config[group]}
    if stored == asked:
        earlier = _changed_before(folder)
        changes = {
            group: OmegaConf.merge(earlier.get(group, {}), changes.get(group, {}))
            for group in RUN_GROUPS
            if group in earlier or group in changes
        }
    elif "loraplus" in changes:
        what = f"in {stored} the rules hold numbers, which loraplus.ratio no longer reaches"
        raise ConfigErrors([Problem("loraplus", what, "leave the loraplus keys as they are")])
    run = read_stored(stored, changes)
    if run.model.trust_remote_code and not config.trust_remote_code:
        what = "the run's model brings Python of its own (model.trust_remote_code)"
        raise ConfigErrors([Problem("trust_remote_code", what, "read it, then set trust_remote_code=true")])
    begun_from = run.trainer.get("resume_from_checkpoint")  # as changed here, or as the run itself once began
    began_elsewhere = begun_from not in (None, AUTO) and config.trainer.get("resume_from_checkpoint") is None
    if began_elsewhere and checkpoints.newest_complete(folder / run_folder.CHECKPOINTS, report=False) is not None:
        begun_from = AUTO
    with open_dict(run):
        run.trainer.resume_from_checkpoint = begun_from or AUTO
    try:
        OmegaConf.to_container(run, resolve=True)
    except OmegaConfBaseException as error:
        first = first_line(error)
        raise ConfigErrors([Problem(str(getattr(error, "full_key", None) or KEY), first, f"see {stored}")]) from None
    return run


def _changed_before(folder: Path) -> dict[str, Any]:
    """What earlier resumes changed, by group, as far as it is in force: the run's own config.yaml has it.

    So a run that was given more steps, and is stopped again, goes on to those.
    """
    in_force = read_plain(folder / run_folder.CONFIG)
    found = OmegaConf.create()
    for file in sorted((folder / run_folder.HYDRA).glob(f"resumed-*/{run_folder.CONFIG}")):
        asked = read_plain(file)
        found.merge_with(_common({group: asked.get(group) for group in RUN_GROUPS}, in_force))
    plain = OmegaConf.to_container(found)
    assert isinstance(plain, dict)
    return {str(group): keys for group, keys in plain.items()}


def _common(asked: Mapping[Any, Any], in_force: Mapping[Any, Any]) -> dict[Any, Any]:
    """The leaves of `asked` that `in_force` has with the same value; none that refers to something else."""
    common: dict[Any, Any] = {}
    for key, value in asked.items():
        there = in_force.get(key)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            if inner := _common(value, there):
                common[key] = inner
        elif key in in_force and value == there and "${" not in str(value):
            common[key] = value
    return common


def _is_of_a_run(asked: Path) -> bool:
    """Whether Hydra's copy of a config is a run's (or empty, cut short), and not that of a program around it."""
    if not asked.is_file():
        return False
    text = asked.read_text(encoding="utf-8", errors="replace")
    return not text.strip() or all(re.search(rf"^{group}:", text, re.MULTILINE) for group in RUN_GROUPS)
