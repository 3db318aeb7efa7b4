"""`train`: check a config and its folder, then train one run. `train` is the default command."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.check import check
from loraplus_hydra.cli.commands.command import Command, Job
from loraplus_hydra.config.hydra_job import search_key
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import processes
from loraplus_hydra.io.checkpoints import AUTO
from loraplus_hydra.io.files import found_at, refuse_unwritable
from loraplus_hydra.io.folders import refuse_used_folder
from loraplus_hydra.io.run_folder import HYDRA


def main(config: DictConfig, flags: frozenset[str]) -> Job:
    """Check the config and the run's folder. Raises UserError."""
    folder = Path(config.hydra.run.dir)
    found_at(folder, "hydra.run.dir")
    # `auto` in a new folder starts a run, because the same command must work for the first and for later starts.
    resumes = OmegaConf.select(config, "trainer.resume_from_checkpoint") == AUTO and (folder / HYDRA).is_dir()
    if processes.is_main():
        if not resumes:
            refuse_used_folder(folder, key="hydra.run.dir")
        refuse_unwritable(folder, key="hydra.run.dir")
    if search_key(config, "halving"):
        fix = "give a key several values and add -m, or remove it"
        raise ConfigErrors([Problem("halving", "halves a grid, and this is a single run", fix)])
    if OmegaConf.select(config, "sweep.name") is not None:
        fix = "name a run's folder with hydra.run.dir, or give a key several values and add -m"
        raise ConfigErrors([Problem("sweep.name", "names a sweep's folder, and this is a single run", fix)])
    if search_key(config, "tune") is not None:
        raise ConfigErrors([Problem("tune", "is a search, and this is a single run", "leave hydra.mode out")])
    checked = check(run_of(config))
    if not resumes:
        return Job(checked)
    from loraplus_hydra.runs.resume import resume_point_or_exit

    return Job(checked, resume_point_or_exit(checked, folder))


COMMAND = Command(
    "train",
    "train one run (the default command); with -m, one run for each combination of values",
    main,
)
