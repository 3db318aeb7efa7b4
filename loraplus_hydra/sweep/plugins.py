"""Hydra's plugins that sweeps can use: what to install for each, where Hydra only says that an option isn't there."""

from __future__ import annotations

from hydra.errors import MissingConfigException

from loraplus_hydra.errors import Problem

# The plugin's own requirements name versions that don't work with this Hydra: optuna 2, or a cloudpickle and an AWS
# client that nobody here needs. An extra can't say --no-deps, so it has what the plugin runs with, and not the plugin.
_WITHOUT_REQUIREMENTS = "pip install 'loraplus_hydra[{extra}]' && pip install --no-deps '{plugin}'"
OPTUNA = _WITHOUT_REQUIREMENTS.format(extra="optuna", plugin="hydra-optuna-sweeper==1.3.0")
_INSTALL = {
    "hydra/sweeper/optuna": OPTUNA,
    "hydra/launcher/joblib": "pip install 'loraplus_hydra[joblib]'",
    "hydra/launcher/submitit_local": "pip install 'loraplus_hydra[submitit]'",
    "hydra/launcher/submitit_slurm": "pip install 'loraplus_hydra[submitit]'",
    "hydra/launcher/ray": _WITHOUT_REQUIREMENTS.format(extra="ray", plugin="hydra-ray-launcher==1.2.2"),
}


def missing_plugin(error: BaseException, key: str) -> Problem | None:
    """A Problem when Hydra lacks an option that a plugin would bring; `key` is what asked for it."""
    if not isinstance(error, MissingConfigException):
        return None
    option = str(error.missing_cfg_file)
    if option not in _INSTALL:
        return None
    return Problem(key, f"{option} is an option of a plugin of Hydra's that isn't installed here", _INSTALL[option])
