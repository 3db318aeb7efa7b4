"""Optuna searches that continue where they stopped.

Hydra's plugin runs `n_trials` trials at each start. This module repairs the study before the plugin opens it. Trials
that failed or never ended are queued again, and only the missing trials are run.
"""

from __future__ import annotations

import warnings
from typing import Any

from omegaconf import DictConfig, open_dict

from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import screen
from loraplus_hydra.sweep.plan import Sweep
from loraplus_hydra.sweep.plugins import OPTUNA

_SWEEPER = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
_OLDEST = 4  # optuna's major version; older versions can't write sqlite files with a recent SQLAlchemy


def continue_study(config: DictConfig, sweep: Sweep) -> None:
    """Set the sweeper's `n_trials`, `direction` and seed so that the search continues its study.

    `config` is the whole config, and `sweep` the sweep that has begun. For other sweepers, nothing is changed. Raises
    UserError.
    """
    sweeper = config.hydra.sweeper
    if sweeper.get("_target_") != _SWEEPER:
        return
    optuna = _import_optuna()
    with open_dict(config):
        if sweeper.get("direction") is None:
            sweeper.direction = "maximize" if config.task.greater_is_better else "minimize"
        storage, name = sweeper.get("storage"), sweeper.get("study_name")
        if name is None or not str(storage).startswith("sqlite:///"):
            return  # the study is in memory, or in a database in which other processes may run trials
        _refuse_second_start(sweep)
        study = _open_study(optuna, storage, name, sweeper.direction)
        wanted, done = int(sweeper.n_trials), _requeue_trials(study, optuna.trial.TrialState)
        sweeper.n_trials = max(0, wanted - done)
        # With the same seed, the sampler would propose the values of the first start again.
        if sweeper.sampler.get("seed") is not None:
            sweeper.sampler.seed += len(study.trials)
    if done:
        more = f"{wanted - done} to go" if done < wanted else f"for more set hydra.sweeper.n_trials above {wanted}"
        screen.show(f"The study has {done} finished trials, the best {study.best_value}; {more}")


def _requeue_trials(study: Any, states: Any) -> int:
    """Queue each trial without a value once. Return the number of trials with a value."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == states.COMPLETE]
    known = [trial.params for trial in complete]
    known += [trial.system_attrs.get("fixed_params", {}) for trial in trials if trial.state == states.WAITING]
    for trial in trials:
        if trial.state == states.RUNNING:  # the trial's process was killed
            study.tell(trial.number, state=states.FAIL)
        if trial.state in (states.RUNNING, states.FAIL) and trial.params and trial.params not in known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)
    return len(complete)


def _import_optuna() -> Any:
    try:
        import optuna  # an extra
    except ImportError as error:
        raise ConfigErrors([Problem("hydra.sweeper", "optuna isn't installed", OPTUNA)]) from error
    if int(optuna.__version__.partition(".")[0]) < _OLDEST:
        what = f"optuna {optuna.__version__} can't store a study in a file"
        raise ConfigErrors([Problem("hydra.sweeper", what, OPTUNA)])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the plugin uses names that optuna 6.0 will remove
    return optuna


def _open_study(optuna: Any, storage: str, name: str, direction: Any) -> Any:
    wanted = getattr(direction, "name", direction)  # either the plugin's enum, or a string
    if not isinstance(wanted, str):
        raise ConfigErrors(
            [Problem("hydra.sweeper.direction", "a run has one metric", "use minimize, maximize or null")]
        )
    study = optuna.create_study(storage=storage, study_name=name, direction=wanted, load_if_exists=True)
    stored = study.direction.name.lower()
    if stored != wanted:
        what = f"is {wanted}, but the existing study {stored}s"
        raise ConfigErrors([Problem("hydra.sweeper.direction", what, "use another study: hydra.sweeper.study_name")])
    return study


def _refuse_second_start(sweep: Sweep) -> None:
    # The other process's active trials would look like trials of a killed start.
    others = [path for path in sweep.start.folder.parent.iterdir() if path != sweep.start.folder]
    if others:
        fix = f"if no such process exists (without file locks, a killed one stays listed), remove {others[0]}"
        raise UserError(f"another process runs this search; {fix}")
