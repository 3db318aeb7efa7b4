"""Installation commands for the Hydra plugins that sweeps can use."""

from __future__ import annotations

from hydra.errors import MissingConfigException

from loraplus_hydra.errors import Problem

# The plugins' own requirements can't be met: optuna 2, or an old cloudpickle and an AWS client. An extra can't use
# --no-deps, so it installs the plugin's dependencies without the plugin.
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
    """Return the Problem if `error` is about an option of a plugin that isn't installed.

    `key` is the override with the option. Hydra's own message doesn't name the plugin.
    """
    if not isinstance(error, MissingConfigException):
        return None
    option = str(error.missing_cfg_file)
    if option not in _INSTALL:
        return None
    return Problem(key, f"{option} is an option of a Hydra plugin that isn't installed", _INSTALL[option])
