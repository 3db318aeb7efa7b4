"""The command line: the first word says what to do, everything behind it is Hydra's own grammar.

Nothing heavy is imported here: `--help`, `--cfg job`, completion and a mistyped override answer without torch.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from loraplus_hydra import processes
from loraplus_hydra.commands import COMMANDS, RESUME, TRAIN
from loraplus_hydra.errors import ConfigErrors, UserError
from loraplus_hydra.limits import refuse_unwritable
from loraplus_hydra.overrides import has_unknown_key, override_problems
from loraplus_hydra.paths import HYDRA, config_folder, refuse_used_folder
from loraplus_hydra.quiet import quiet_libraries
from loraplus_hydra.schema import register

# Hydra's flags whose value is the next word.
_FLAGS_WITH_VALUE = frozenset(
    (
        "--cfg",
        "-c",
        "--package",
        "-p",
        "--info",
        "-i",
        "--config-path",
        "-cp",
        "--config-name",
        "-cn",
        "--config-dir",
        "-cd",
    )
)
EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a cluster sends it before it takes a machine back."""


class BeforeRun(Callback):
    """Hydra calls it with the whole config before it makes the run's folder, so that a wrong config leaves no trace.

    Every command but `train` and `resume` does its work here and ends the program.
    """

    def __init__(self, command: str, flags: list[str]) -> None:
        self.command = command
        self.flags = frozenset(flags)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra turns a callback's exceptions into warnings; only SystemExit and its like get through.
        try:
            self._do(config)
        except UserError as error:
            _print_error(error)
            raise SystemExit(EXIT_USER_ERROR) from error
        except Exception as error:
            if os.environ.get(_SHOW_TRACEBACK):
                raise SystemExit(_with_traceback(error)) from error
            _print_error(error)
            raise SystemExit(EXIT_USER_ERROR) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.command != TRAIN:
            _print_error(UserError(f"'{self.command}' takes one config, not a sweep; leave out --multirun"))
            raise SystemExit(EXIT_USER_ERROR)

    def _do(self, config: DictConfig) -> None:
        folder = Path(config.hydra.run.dir)
        if self.command == TRAIN and processes.is_main() and not _goes_on(config, folder):
            refuse_used_folder(folder, key="hydra.run.dir")
            refuse_unwritable(folder, key="hydra.run.dir")
        task = config.copy()
        with open_dict(task):
            del task["hydra"]
        quiet_libraries()
        importlib.import_module(f"loraplus_hydra.commands.{self.command}").main(task, self.flags)
        if self.command not in (TRAIN, RESUME):
            raise SystemExit(0)


def _goes_on(config: DictConfig, folder: Path) -> bool:
    """Whether the run is asked to go on in `folder`, which an earlier start of it has used."""
    asked = OmegaConf.select(config, "trainer.resume_from_checkpoint", default=None) == "auto"
    return asked and (folder / HYDRA).is_dir()


@hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
def _train(config: DictConfig) -> float | None:
    from loraplus_hydra.job import run

    if "run" in config:  # `resume` names a run
        from loraplus_hydra.commands.resume import resumed_config

        config = resumed_config(config)
    return run(config).value


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
        overrides = _hydra_arguments(name, arguments)
        processes.refuse_sweep(arguments)
        if COMMANDS[name].config == "config" and has_unknown_key(overrides):
            raise ConfigErrors(override_problems(overrides, "config"))
        sys.argv[1:] = overrides + processes.hydra_arguments()
        _train()
    except Terminated:
        sys.exit(EXIT_TERMINATED)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if os.environ.get(_SHOW_TRACEBACK):
            raise
        _print_error(_as_told(error, name, overrides))
        sys.exit(EXIT_USER_ERROR)


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
    if command.positional and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        extra.append(f"{command.positional}={_quoted(rest.pop(0))}")
    flags = [argument.removeprefix("--") for argument in rest if argument.removeprefix("--") in command.flags]
    if flags:
        extra.append(f"hydra.callbacks.before_run.flags=[{','.join(flags)}]")
    rest = [_verbatim(argument, command.verbatim) for argument in rest]
    # Keys of a finished run's config, which the command's own YAML can't list.
    rest = [f"++{text}" if text.split(".")[0] in command.changes and "." in text else text for text in rest]
    rest = [argument for argument in rest if argument.removeprefix("--") not in command.flags]
    place = _first_override(rest)  # argparse takes overrides in one row only
    config = [f"--config-name={command.config}"] if command.config != "config" else []
    return [*rest[:place], *extra, *rest[place:], *config]


def _first_override(arguments: list[str]) -> int:
    """Where the overrides begin, or would if there are none."""
    for place, argument in enumerate(arguments):
        if not argument.startswith("-") and (place == 0 or arguments[place - 1] not in _FLAGS_WITH_VALUE):
            return place
    return len(arguments)


def _verbatim(argument: str, keys: tuple[str, ...]) -> str:
    """`text=...` with its value quoted, unless it is quoted already or is null."""
    key, found, value = argument.partition("=")
    if not found or key not in keys or value == "null" or value[:1] in ("'", '"'):
        return argument
    return f"{key}={_quoted(value)}"


def _quoted(value: str) -> str:
    """A value as Hydra's grammar reads it back, whatever characters are in it.

    A backslash escapes only a quote, or a backslash in front of one.
    """
    inner = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{inner}'"


def _as_told(error: Exception, command: str, arguments: list[str]) -> Exception:
    """`error` as the user should read it: a config that doesn't compose becomes the list of what is wrong with it."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError) or not isinstance(error, (HydraException, OmegaConfBaseException)):
        return error
    problems = override_problems(arguments, COMMANDS[command].config, error)
    return ConfigErrors(problems) if problems else error


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
    import traceback

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
