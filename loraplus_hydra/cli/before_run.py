"""The Hydra callback that runs the commands.

Hydra makes a run's folder and log before it calls the task function. If the config were checked there, an invalid
config would leave a folder. A callback gets the whole config earlier, so every command runs in `on_run_start`. All
commands except `train` and `resume` end the program there. These two store a `Job` in `BeforeRun.job`, which the task
function uses later in the same process. A sweep begins in `on_multirun_start`, and each of its jobs checks its own
config.

Hydra turns a callback's errors into warnings and continues. Only SystemExit and KeyboardInterrupt end the program, so
commands run inside `exit_on_error`.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.cli.commands.command import Command, Job
from loraplus_hydra.cli.errors import exit_on_error
from loraplus_hydra.cli.hydra_settings import refuse_wrong_settings
from loraplus_hydra.config.hydra_job import search_key
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import processes, screen
from loraplus_hydra.io.quiet_libraries import quiet_libraries
from loraplus_hydra.sweep.halving_search import check_halving, use_halving
from loraplus_hydra.sweep.plan import Sweep, begin
from loraplus_hydra.sweep.search import continue_study


class BeforeRun(Callback):
    """Runs a command with its `--flags` as soon as the config is composed."""

    # State of this process, stored on the class, because Hydra can't pass objects from a callback to the task function.
    job: ClassVar[Job | None] = None
    sweep: ClassVar[Sweep | None] = None

    def __init__(self, command: str, flags: list[str]) -> None:
        self.name = command
        self.flags = frozenset(flags)

    @property
    def command(self) -> Command:
        """The command. Raises ConfigErrors if no command has this name."""
        if self.name not in COMMANDS:
            key, fix = "hydra.callbacks.before_run.command", "the command must be the first word"
            raise ConfigErrors([Problem(key, f"there is no command '{self.name}'", fix)])
        return COMMANDS[self.name]

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_on_error():
            refuse_wrong_settings(config.hydra)
            quiet_libraries()
            BeforeRun.job = self.command.main(config, self.flags)
            if BeforeRun.job is None:
                raise SystemExit(0)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_on_error():
            refuse_wrong_settings(config.hydra)
            if self.command.name != "train":
                raise UserError(f"'{self.command.name}' needs one config, not a sweep; remove --multirun")
            processes.refuse_sweep(["--multirun"])  # also if the config sets hydra.mode
            if search_key(config, "tune") is not None or config.hydra.runtime.choices.get("hparams_search") == "tune":
                BeforeRun.sweep = _begin_tuning(config)
                return
            search_key(config, "halving")
            check_halving(config)
            BeforeRun.sweep = begin(config, sys.argv[1:])
            use_halving(config, BeforeRun.sweep)
            continue_study(config, BeforeRun.sweep)


def _begin_tuning(config: DictConfig) -> Sweep:
    """Begin a search by `tune`. Raises ConfigErrors before anything is written."""
    # Takes a tenth of a start, and few starts need it
    from loraplus_hydra.sweep.tune_search import check_candidates, check_tuning, use_tuning

    quiet_libraries()
    settings = check_tuning(config)
    check_candidates(settings, config)
    screen.show(settings.summary())
    sweep = begin(config, sys.argv[1:], keys=settings.swept)
    use_tuning(config, sweep)
    return sweep
