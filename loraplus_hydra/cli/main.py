"""The command line: the first word says what to do, everything behind it is Hydra's own grammar.

Nothing heavy is imported here: `--help`, `--cfg job`, completion and a mistyped override answer without torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.cli.commands import COMMANDS, RESUME, TRAIN
from loraplus_hydra.cli.flags import flags_and_overrides, refuse_wrong_flags
from loraplus_hydra.cli.override_problems import has_unknown_key, is_of_composing, override_problems
from loraplus_hydra.config.hydra_job import is_sweep, quoted
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import register, run_of
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import processes, screen
from loraplus_hydra.io.files import refuse_unwritable, refuse_used_folder
from loraplus_hydra.io.quiet_libraries import quiet_libraries
from loraplus_hydra.io.run_folder import HYDRA
from loraplus_hydra.sweep.folders import register as register_interpolations

if TYPE_CHECKING:
    from loraplus_hydra.sweep.plan import Sweep

EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster sends it before it takes a machine back."""


class BeforeRun(Callback):
    """Hydra calls it with the whole config before it makes the run's folder, so that a wrong config leaves no trace.

    Every command but `train` and `resume` does its work here and ends the program. `swept` and `start` are what a sweep
    tells its jobs: they are read in the config (see `sweep.folders`, `sweep.jobs`).
    """

    def __init__(self, command: str, flags: list[str], swept: list[str], start: str | None) -> None:
        self.command = command
        self.flags = frozenset(flags)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _ending_the_program():
            self._do(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _ending_the_program():
            if self.command != TRAIN:
                raise UserError(f"'{self.command}' takes one config, not a sweep; leave out --multirun")
            processes.refuse_sweep(["--multirun"])  # also where the config asks for it (hydra.mode)
            from loraplus_hydra.sweep.plan import begin

            _begun.append(begin(config, sys.argv[1:]))
            from loraplus_hydra.sweep.search import continue_study

            continue_study(config, _begun[-1])

    def _do(self, config: DictConfig) -> None:
        folder = Path(config.hydra.run.dir)
        if self.command == TRAIN and processes.is_main():
            if not _goes_on(config, folder):
                refuse_used_folder(folder, key="hydra.run.dir")
            refuse_unwritable(folder, key="hydra.run.dir")
        quiet_libraries()
        importlib.import_module(f"loraplus_hydra.cli.commands.{self.command}").main(run_of(config), self.flags)
        if self.command == TRAIN and _goes_on(config, folder):
            from loraplus_hydra.runs.resume import resume_point_or_exit

            resume_point_or_exit(run_of(config), folder)
        if self.command not in (TRAIN, RESUME):
            raise SystemExit(0)


def _goes_on(config: DictConfig, folder: Path) -> bool:
    """Whether the run is asked to go on in `folder`, which an earlier start of it has used."""
    asked = OmegaConf.select(config, "trainer.resume_from_checkpoint", default=None) == "auto"
    return asked and (folder / HYDRA).is_dir()


@contextmanager
def _ending_the_program() -> Iterator[None]:
    """Tell an exception and end: Hydra turns a callback's into warnings; only SystemExit and its like get through."""
    try:
        yield
    except UserError as error:
        screen.log_to_file(f"Error: {error}", logging.ERROR)
        _print_error(error)
        raise SystemExit(EXIT_USER_ERROR) from error
    except Exception as error:
        screen.log_to_file("".join(traceback.format_exception(error)), logging.ERROR)
        if os.environ.get(_SHOW_TRACEBACK):
            raise SystemExit(_with_traceback(error)) from error
        _print_error(error)
        raise SystemExit(EXIT_USER_ERROR) from error


def train(config: DictConfig) -> float | None:
    """What Hydra calls for each run and each job of a sweep: the metric that a sweep compares.

    Launchers send it to their workers by its name, so importing this module there registers what the config refers to.
    """
    config = run_of(config)
    if is_sweep(HydraConfig.get()):
        from loraplus_hydra.sweep.jobs import run_job

        return run_job(config)
    from loraplus_hydra.runs.job import run

    with _ending_the_program():  # Hydra would put a line of its own ahead of the error
        if "run" in config:  # `resume` names a run
            from loraplus_hydra.cli.commands.resume import resumed_config

            config = resumed_config(config)
        return run(config).value


register_interpolations()
_hydra_main = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(train)
_begun: list[Sweep] = []  # the sweep of this process, once it has begun
_SHOW_TRACEBACK = "LORAPLUS_HYDRA_TRACEBACK"


def main() -> None:
    """Run the command line and end with its exit status: 0, 1, 130 (Ctrl-C) or 143 (SIGTERM)."""
    # With HYDRA_FULL_ERROR Hydra hands us its errors as they are; whether the user wants tracebacks is kept beside it.
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        os.environ[_SHOW_TRACEBACK] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    signal.signal(signal.SIGTERM, _terminate)
    register()
    name, arguments = split_command(sys.argv[1:])
    if any(argument.startswith("query=") for argument in arguments):
        _complete()
    try:
        try:
            status = _run(name, arguments)
        finally:
            failed = _end_sweep()
    except Terminated:
        status, failed = EXIT_TERMINATED, False
    except KeyboardInterrupt:
        status, failed = EXIT_INTERRUPTED, False
    if status or failed:
        sys.exit(status or EXIT_USER_ERROR)


def _run(name: str, arguments: list[str]) -> int:
    """Run a command; its exit status."""
    overrides = arguments
    try:
        refuse_wrong_flags(arguments, COMMANDS[name].flags)
        overrides = _hydra_arguments(name, arguments)
        if name == RESUME and not any(override.startswith("run=") for override in overrides):
            raise ConfigErrors([Problem("run", "no run is named", "write its folder behind the command")])
        processes.refuse_sweep(arguments)
        if COMMANDS[name].config == "config" and has_unknown_key(overrides):
            raise ConfigErrors(override_problems(overrides, "config"))
        sys.argv[1:] = overrides + processes.hydra_arguments()
        _hydra_main()
    except Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get(_SHOW_TRACEBACK):
            raise
        _print_error(_as_told(error, name, overrides))
        return EXIT_USER_ERROR
    return 0


def _end_sweep() -> bool:
    """Tell how the sweep's jobs ended, if there was one, and make its report. Returns whether any of them failed."""
    if not _begun:
        return False
    from loraplus_hydra.sweep.finish import finish

    return not finish(_begun.pop())


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command and what is behind it; a first word that is no command begins the overrides of `train`."""
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    return TRAIN, arguments


def _hydra_arguments(name: str, arguments: list[str]) -> list[str]:
    """A command's arguments as Hydra takes them: its bare word becomes an override, its flags go to BeforeRun."""
    command = COMMANDS[name]
    rest = list(arguments)
    extra = []
    if name != TRAIN:
        extra.append(f"hydra.callbacks.before_run.command={name}")
    if command.positional and rest and _is_bare(rest[0]):
        extra.append(f"{command.positional}={quoted(rest.pop(0))}")
    flags = [argument.removeprefix("--") for argument in rest if argument.removeprefix("--") in command.flags]
    if flags:
        extra.append(f"hydra.callbacks.before_run.flags=[{','.join(flags)}]")
    rest = [_verbatim(argument, command.verbatim) for argument in rest]
    # Keys of a finished run's config, which the command's own YAML can't list.
    rest = [f"++{text}" if text.split(".")[0] in command.changes and "." in text else text for text in rest]
    rest = [argument for argument in rest if argument.removeprefix("--") not in command.flags]
    hydras, overrides = flags_and_overrides(rest)
    config = [f"--config-name={command.config}"] if command.config != "config" else []
    return [*config, *hydras, *extra, *overrides]


def _is_bare(word: str) -> bool:
    """Whether a word is neither a flag nor an override: a folder may have a `=` in its name."""
    return not word.startswith("-") and ("=" not in word or Path(word).is_dir())


def _verbatim(argument: str, keys: tuple[str, ...]) -> str:
    """`text=...` with its value quoted, unless it is quoted already or is null."""
    key, found, value = argument.partition("=")
    if not found or key not in keys or value == "null" or value[:1] in ("'", '"'):
        return argument
    return f"{key}={quoted(value)}"


def _as_told(error: Exception, command: str, arguments: list[str]) -> Exception:
    """`error` as the user should read it: a config that doesn't compose becomes the list of what is wrong with it."""
    if isinstance(error, UserError) or not is_of_composing(error):
        return error
    if problems := override_problems(arguments, COMMANDS[command].config, error):
        return ConfigErrors(problems)
    return UserError(str(error)) if isinstance(error, HydraException) else error  # of the flags, or of the user's YAML


def _print_error(error: Exception) -> None:
    if not processes.is_main() and isinstance(error, UserError):
        return  # the first process says the same
    if isinstance(error, ConfigErrors):
        count = len(error.problems)
        print(f"{count} thing{'s' if count > 1 else ''} to put right:", file=sys.stderr)
        for problem in error.problems:
            print(f"  - {problem}", file=sys.stderr)
    elif isinstance(error, UserError):
        print(f"Error: {error}", file=sys.stderr)
    else:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        print("Set the environment variable HYDRA_FULL_ERROR=1 for the traceback.", file=sys.stderr)


def _with_traceback(error: Exception) -> int:
    traceback.print_exception(error)
    return EXIT_USER_ERROR


def _complete() -> None:
    """Complete the first word here, and let Hydra complete what stands behind it."""
    line = os.environ.get("COMP_LINE", "")
    program, *typed = line.split(" ")
    if len(typed) == 1:
        print("\n".join(f"{name} " for name in COMMANDS if name.startswith(typed[0])))
    elif typed and typed[0] in COMMANDS:
        shorter = " ".join([program, *typed[1:]])
        point = int(os.environ.get("COMP_POINT") or len(line))
        os.environ["COMP_LINE"] = shorter
        os.environ["COMP_POINT"] = str(max(0, point - (len(line) - len(shorter))))


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated
