"""`export`: write a finished run's merged model or adapter, with a card, into a new folder."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.errors import Problem, refuse
from loraplus_hydra.io import files, folders, interrupts
from loraplus_hydra.runs.finished import open_named_run
from loraplus_hydra.runs.stored_config import unnamed_run

_DTYPES = ("float32", "bfloat16", "float16")


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Write the run's merged model, or its adapter. Raises UserError."""
    problems = unnamed_run(config)
    if config.dtype is not None and not config.merge:
        problems.append(Problem("dtype", "an adapter keeps the dtype in which it was trained", "leave it null"))
    elif config.dtype not in (None, *_DTYPES):
        problems.append(Problem("dtype", f"'{config.dtype}' is not a dtype", f"use one of {', '.join(_DTYPES)}"))
    refuse(problems)
    run = open_named_run(config)
    of_step = "" if run.step is None else f"-of-step-{run.step}"
    default = run.folder / "export" / (("model" if config.merge else "adapter") + of_step)
    target = expanded(config.to) if config.to else default
    folders.refuse_used_folder(target, key="to")
    files.refuse_unwritable(target.parent, key="to")
    from loraplus_hydra.runs.export import export

    with interrupts.notice("the export stops after the current step, and its folder is removed"):
        written = export(run, target, merge=config.merge, dtype=config.dtype, report=print)
    print(f"{'The merged model' if config.merge else 'The adapter'} is in {written}, with a card in README.md.")


COMMAND = Command(
    "export",
    "write the merged model of a finished run (merge=false: its adapter), with a card",
    main,
    usage="RUN [merge=false]",
    config="export",
    positional="run",
    changes=("model",),
)
