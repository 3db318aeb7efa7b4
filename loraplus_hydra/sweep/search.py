"""A search by Optuna that goes on where it stopped: Hydra's plugin asks for as many trials at each start.

Before the plugin opens the study, what an earlier start has left of it is put in order here: trials that never ended or
failed are tried again first, and only as many are asked for as are still missing.
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
_OLDEST = 4  # optuna's major version: older ones can't write their sqlite file with today's SQLAlchemy


def continue_study(config: DictConfig, sweep: Sweep) -> None:
    """Set the plugin's `n_trials`, `direction` and sampler's seed by the study that is there.

    `config` is the program's, `sweep` what has begun by it; another sweeper than Optuna's is left alone. Raises
    UserError.
    """
    sweeper = config.hydra.sweeper
    if sweeper.get("_target_") != _SWEEPER:
        return
    optuna = _optuna()
    with open_dict(config):
        if sweeper.get("direction") is None:
            sweeper.direction = "maximize" if config.task.greater_is_better else "minimize"
        storage, name = sweeper.get("storage"), sweeper.get("study_name")
        if name is None or not str(storage).startswith("sqlite:///"):
            return  # in memory, or in a database where others' trials may be under way
        _refuse_company(sweep)
        study = optuna.create_study(
            storage=storage, study_name=name, direction=_direction(sweeper.direction), load_if_exists=True
        )
        _same_direction(study, _direction(sweeper.direction))
        wanted, done = int(sweeper.n_trials), _put_in_order(study, optuna.trial.TrialState)
        sweeper.n_trials = max(0, wanted - done)
        # From the same seed again a sampler would propose again what it did at the first start.
        if sweeper.sampler.get("seed") is not None:
            sweeper.sampler.seed += len(study.trials)
    if done:
        more = f"{wanted - done} to go" if done < wanted else f"for more set hydra.sweeper.n_trials above {wanted}"
        screen.show(f"The study has {done} finished trials, the best {study.best_value}; {more}")


def _put_in_order(study: Any, states: Any) -> int:
    """Queue the trials that have no value, once each. Returns how many have one."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == states.COMPLETE]
    known = [trial.params for trial in complete]
    known += [trial.system_attrs.get("fixed_params", {}) for trial in trials if trial.state == states.WAITING]
    for trial in trials:
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
        if trial.state in (states.RUNNING, states.FAIL) and trial.params and trial.params not in known:
            study.enqueue_trial(trial.params)
            known.append(trial.params)
    return len(complete)


def _optuna() -> Any:
    """The library, quiet. Raises UserError when it is too old."""
    import optuna

    if int(optuna.__version__.partition(".")[0]) < _OLDEST:
        what = f"optuna {optuna.__version__} can't keep a study in a file here"
        raise ConfigErrors([Problem("hydra.sweeper", what, OPTUNA)])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the plugin uses names that optuna will drop in 6.0
    return optuna


def _direction(direction: Any) -> str:
    if not isinstance(getattr(direction, "name", direction), str):
        raise ConfigErrors([Problem("hydra.sweeper.direction", "a run has one metric", "minimize, maximize or null")])
    return str(getattr(direction, "name", direction))


def _same_direction(study: Any, wanted: str) -> None:
    if study.direction.name.lower() != wanted:
        what = f"is {wanted}, but the study that is there {study.direction.name.lower()}s"
        raise ConfigErrors([Problem("hydra.sweeper.direction", what, "name another study: hydra.sweeper.study_name")])


def _refuse_company(sweep: Sweep) -> None:
    """Raise UserError beside another start of the search: its trials under way look like those of a killed one."""
    others = [path for path in sweep.start.folder.parent.iterdir() if path != sweep.start.folder]
    if others:
        fix = f"if none is (a file system without locks forgets nobody), remove {others[0]}"
        raise UserError(f"another process is at this search; {fix}")
