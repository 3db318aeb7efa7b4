"""`resume`: resume an interrupted run from its newest complete checkpoint, in its own folder."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check
from loraplus_hydra.cli.commands.command import Command, Job
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.config.schema import RUN_GROUPS
from loraplus_hydra.io import processes
from loraplus_hydra.io.files import refuse_unwritable
from loraplus_hydra.runs.resumed_config import resumed_config
from loraplus_hydra.runs.stored_config import named_run


def main(config: DictConfig, flags: frozenset[str]) -> Job:
    """Find the run's resume point. End the program if the run has finished.

    No file is changed. Raises UserError if the run can't resume.
    """
    folder = expanded(named_run(config))
    run, point = resumed_config(folder, config)
    checked = check(run)
    from loraplus_hydra.runs.resume import resume_point_or_exit

    point = resume_point_or_exit(checked, folder, found_before=point)
    if processes.is_main():
        refuse_unwritable(folder, key="run")
    return Job(checked, point)


COMMAND = Command(
    "resume",
    "resume an interrupted run from its newest complete checkpoint",
    main,
    usage="RUN [trainer.max_steps=800]",
    config="resume",
    positional="run",
    changes=RUN_GROUPS,
)
