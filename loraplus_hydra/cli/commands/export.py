"""`export`: write a finished run's merged model or adapter, with a card, into a new folder."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.errors import Problem, nearest, refuse
from loraplus_hydra.io import files, folders, interrupts
from loraplus_hydra.runs.export_targets import KEY, MERGED_BY_DEFAULT, TARGETS
from loraplus_hydra.runs.finished import FinishedRun, open_named_run
from loraplus_hydra.runs.stored_config import unnamed_run

_DTYPES = ("float32", "bfloat16", "float16")


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Write the run's merged model, or its adapter, and upload it if the config names a repository.

    Raises UserError.
    """
    merge = MERGED_BY_DEFAULT.get(config.target, True) if config.merge is None else config.merge
    refuse([*unnamed_run(config), *_wrong_values(config, merge=merge)])
    run = open_named_run(config)
    folder = expanded(config.to) if config.to else _default_folder(run, config.target, merge=merge)
    folders.refuse_used_folder(folder, key="to")
    files.refuse_unwritable(folder.parent, key="to")
    from loraplus_hydra.runs.export import export
    from loraplus_hydra.runs.export_check import check_target

    served = None if config.target is None else check_target(run, config.target, merged=merge)
    if config.push is not None:
        from loraplus_hydra.runs.push import check_repository

        check_repository(config.push, private=config.private)
    with interrupts.notice("the export stops after the current step, and its folder is removed"):
        written = export(run, folder, merge=merge, dtype=config.dtype, served=served, report=print)
    print(f"{'The merged model' if merge else 'The adapter'} is in {written}, with a card in README.md.")
    if served is not None and (commands := served.told(written)):
        print(commands)
    if config.push is not None:
        _push(written, config)


def _wrong_values(config: DictConfig, *, merge: bool) -> list[Problem]:
    found = []
    if config.target not in (None, *TARGETS):
        what = f"'{config.target}' is not a target{nearest(config.target.lower(), TARGETS)}"
        found.append(Problem(KEY, what, f"use one of {', '.join(TARGETS)}; `to` is the folder"))
    if config.dtype is not None and not merge:
        found.append(Problem("dtype", "an adapter keeps the dtype in which it was trained", "leave it null"))
    elif config.dtype not in (None, *_DTYPES):
        found.append(Problem("dtype", f"'{config.dtype}' is not a dtype", f"use one of {', '.join(_DTYPES)}"))
    if config.push is not None:
        from loraplus_hydra.runs.push import name_problems

        found += name_problems(config.push)
    elif not config.private:
        found.append(Problem("private", "nothing is uploaded", "set push=owner/name, or leave it out"))
    return found


def _default_folder(run: FinishedRun, target: str | None, *, merge: bool) -> Path:
    of_target = "" if target is None else f"{target}-"
    of_step = "" if run.step is None else f"-of-step-{run.step}"
    return run.folder / "export" / f"{of_target}{'model' if merge else 'adapter'}{of_step}"


def _push(folder: Path, config: DictConfig) -> None:
    from loraplus_hydra.runs.push import push

    print(f"Uploading to {config.push} ({'private' if config.private else 'open to everyone'}) ...", flush=True)
    with interrupts.notice("the upload ends, and the export stays"):
        interrupts.raise_at_once(True)  # the upload is another library's, so no code could check the flag
        try:
            address = push(folder, config.push, private=config.private)
        except KeyboardInterrupt:
            print(f"The upload was stopped. The export stays in {folder}.", file=sys.stderr)
            raise
        finally:
            interrupts.raise_at_once(False)
    print(f"It is at {address}.")


COMMAND = Command(
    "export",
    "write the merged model of a finished run (merge=false: its adapter), with a card",
    main,
    usage="RUN [target=vllm] [merge=false]",
    config="export",
    positional="run",
    verbatim=("to",),
    changes=("model",),
)
