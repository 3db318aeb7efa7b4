"""The command line. The first word is a command, and all other words follow Hydra's grammar.

This module doesn't import torch, so `--help`, `--cfg job`, completion and errors in overrides are fast.
"""

from __future__ import annotations

import logging
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.cli.arguments import hydra_arguments, refuse_wrong_flags, split_command, with_values
from loraplus_hydra.cli.before_run import BeforeRun
from loraplus_hydra.cli.commands import COMMANDS, commands_help
from loraplus_hydra.cli.errors import (
    EXIT_USER_ERROR,
    exit_on_error,
    print_error,
    take_over_full_error,
    wants_traceback,
)
from loraplus_hydra.cli.hydra_settings import explain_logging_error
from loraplus_hydra.cli.override_problems import has_unknown_key, is_composing_error, override_problems
from loraplus_hydra.config.hydra_job import is_sweep
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import register
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import interrupts, processes
from loraplus_hydra.io.streams import lost_output, make_streams_last
from loraplus_hydra.sweep.folders import register as register_interpolations


def train(config: DictConfig) -> float | None:
    """Train the run that BeforeRun has checked, or one job of a sweep. Hydra calls this function.

    Returns the metric that a sweep compares. Launchers pass this function to their workers by name. So workers import
    this module, which registers the config's interpolations.
    """
    if is_sweep(HydraConfig.get()):
        from loraplus_hydra.sweep.jobs import run_job

        return run_job(config)
    from loraplus_hydra.runs.job import run

    job, BeforeRun.job = BeforeRun.job, None
    with exit_on_error():  # Hydra would print its own line before the error
        if job is None:  # a config of the user's own, without conf/app.yaml
            fix = "its defaults list must begin with `- config`, this program's own config"
            raise ConfigErrors([Problem("--config-name", "this config doesn't have the callback `before_run`", fix)])
        return run(job.checked, point=job.point).value


register_interpolations()
OmegaConf.register_new_resolver("loraplus.commands", commands_help, replace=True)  # for `--help`
_hydra_main = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(train)


def main() -> None:
    """Run the command line and end the program with its exit status."""
    logging.raiseExceptions = False  # a log file on a full disk would add a traceback to the error that says so
    make_streams_last()
    take_over_full_error()
    register()
    name, arguments = split_command(sys.argv[1:])
    if any(argument.startswith("query=") for argument in arguments):
        _complete()
    with interrupts.kept_signals(deliver=False):
        try:
            try:
                status = _run(name, arguments)
            finally:
                failed = _finish_sweep()
            interrupts.stop_if_asked()
        except KeyboardInterrupt as error:
            status, failed = interrupts.status_of(error), False
    if (lost := lost_output()) and not status:
        if name in ("train", "resume"):
            print(f"stdout could not be written ({lost}); the log file has everything", file=sys.stderr)
        else:
            print(f"Error: stdout could not be written: {lost}", file=sys.stderr)
            status = EXIT_USER_ERROR
    if status or failed:
        sys.exit(status or EXIT_USER_ERROR)


def _run(name: str, arguments: list[str]) -> int:
    """Run a command and return its exit status."""
    overrides = arguments
    try:
        interrupts.stop_if_asked()  # a signal may have come while this module was imported
        if unknown := refuse_wrong_flags(arguments, COMMANDS[name].flags):
            flags, others = with_values(unknown, arguments)
            raise ConfigErrors(override_problems(hydra_arguments(name, others), COMMANDS[name].config, flags=flags))
        overrides = hydra_arguments(name, arguments)
        if name == "resume" and not any(override.startswith("run=") for override in overrides):
            raise ConfigErrors([Problem("run", "no run's folder is given", "write the folder after the command")])
        if COMMANDS[name].search is not None and sum(text.startswith("hparams_search=") for text in overrides) > 1:
            raise ConfigErrors([Problem("hparams_search", f"`{name}` is a sweep of its own", "leave it out")])
        processes.refuse_sweep(arguments)
        if COMMANDS[name].config == "config" and has_unknown_key(overrides):
            raise ConfigErrors(override_problems(overrides, "config"))
        sys.argv[1:] = overrides + processes.hydra_arguments()
        _hydra_main()
    except KeyboardInterrupt as error:
        print("\nInterrupted.", file=sys.stderr)
        return interrupts.status_of(error)
    except SystemExit as end:  # most commands end so, in a callback; a signal may still wait to be answered
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if wants_traceback():
            raise
        print_error(explain_logging_error(_explain(error, name, overrides)))
        return EXIT_USER_ERROR
    return 0


def _finish_sweep() -> bool:
    """Write the report of the sweep, if one has begun. Return True if a job failed."""
    sweep, BeforeRun.sweep = BeforeRun.sweep, None
    if sweep is None:
        return False
    from loraplus_hydra.sweep.finish import finish

    with interrupts.answered():  # a sweep that a signal stopped gets a report, too
        return not finish(sweep)


def _explain(error: Exception, command: str, arguments: list[str]) -> Exception:
    """Return ConfigErrors if overrides caused Hydra's error, otherwise an error without traceback."""
    if isinstance(error, UserError) or not is_composing_error(error):
        return error
    if problems := override_problems(arguments, COMMANDS[command].config, error):
        return ConfigErrors(problems)
    # The error is in the flags, or in the user's YAML
    return UserError(str(error)) if isinstance(error, HydraException) else error


def _complete() -> None:
    """Complete the first word. Prepare the environment, because Hydra completes the other words."""
    line = os.environ.get("COMP_LINE", "")
    program, *typed = line.split(" ")
    if len(typed) == 1:
        print("\n".join(f"{name} " for name in COMMANDS if name.startswith(typed[0])))
    elif typed and typed[0] in COMMANDS:
        shorter = " ".join([program, *typed[1:]])
        point = int(os.environ.get("COMP_POINT") or len(line))
        os.environ["COMP_LINE"] = shorter
        os.environ["COMP_POINT"] = str(max(0, point - (len(line) - len(shorter))))
