"""Reading of a run's stored config. Its references are never followed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.check.foreign import foreign_code, moved_paths
from loraplus_hydra.check.keys import read_config, unknown_keys
from loraplus_hydra.config.identity import ALLOW
from loraplus_hydra.config.plain import flat, plain_at, plain_of, value_at
from loraplus_hydra.config.schema import NOT_OF_A_RUN, RunConfig
from loraplus_hydra.config.stored_paths import PATH_KEYS, is_absolute_of, is_here, with_absolute_paths
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, refuse
from loraplus_hydra.io import checkpoints, run_folder
from loraplus_hydra.io.read import RESOLVER, Hostile, Unreadable, read_yaml

KEY = "run"
_NOT_OF_TRAINING = (checkpoints.KEY, ALLOW)
_RULES = "loraplus.rules."


def unnamed_run(config: DictConfig) -> list[Problem]:
    """Return a Problem if the command line has no run's folder."""
    missing = OmegaConf.is_missing(config, "run")
    return [Problem(KEY, "no run's folder is given", "write the folder after the command")] if missing else []


def named_run(config: DictConfig) -> str:
    """Return the run's folder from the command line. Raises ConfigErrors if there is none."""
    refuse(unnamed_run(config))
    return str(config.run)


def read_stored(file: Path, overrides: Mapping[str, Any]) -> DictConfig:
    """Return the stored config in `file` with `overrides` (group -> keys), typed by the schema.

    Raises ConfigErrors, also if the config names code in the run's own folder.
    """
    hydras = file.parent.name == run_folder.HYDRA  # True for Hydra's copy of the config, which is one folder deeper
    try:
        stored = OmegaConf.create(read_yaml(file))
    except (Unreadable, OmegaConfBaseException) as error:
        what = str(error) if isinstance(error, Unreadable) else f"{file} can't be read: {first_line(error)}"
        raise ConfigErrors([Problem(KEY, what, "use another run")]) from None
    if not hydras and (key := _interpolated(stored)):
        what = f"{file}: {key} is an interpolation, which could read your environment; runs never write one"
        raise ConfigErrors([Problem(KEY, what, "replace it with the value")])
    for key in NOT_OF_A_RUN:
        stored.pop(key, None)
    if hydras:
        resolved = read_plain(file.parent.parent / run_folder.CONFIG)
        _put_values_for_resolvers(stored, flat(resolved))
        _put_absolute_paths(stored, resolved)
    folder = file.parent.parent if hydras else file.parent
    schema = OmegaConf.structured(RunConfig)
    changes = {group: dict(keys) for group, keys in overrides.items() if keys}
    try:
        # Merged without types first, because then all unknown keys are reported, not only the first.
        config = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(schema)), stored, changes)
        assert isinstance(config, DictConfig)
        refuse(_moved(config, folder) or unknown_keys(plain_of(config, resolve=False), OmegaConf.create()))
        typed = OmegaConf.merge(schema, config)
    except OmegaConfBaseException as error:
        first = first_line(error)
        raise ConfigErrors([Problem(str(getattr(error, "full_key", None) or KEY), first, f"see {file}")]) from None
    assert isinstance(typed, DictConfig)
    refuse(foreign_code(read_config(typed)[0], folder))
    return typed


def _put_values_for_resolvers(stored: DictConfig, values: Mapping[str, Any]) -> None:
    """Replace each `${resolver:...}` with its value in the run.

    Resolving it could read the environment.

    `values` are from the run's config.yaml. Raises ConfigErrors if a value is missing.
    """
    for key, value in flat(plain_of(stored, resolve=False)).items():
        if not RESOLVER.search(str(value)):
            continue
        if key not in values or RESOLVER.search(str(values[key])):
            what = f"{key} is {value}, which is not resolved, and {run_folder.CONFIG} doesn't have its value"
            raise ConfigErrors([Problem(KEY, what, "replace it with the value")])
        OmegaConf.update(stored, key, values[key])


def _put_absolute_paths(stored: DictConfig, values: Mapping[str, Any]) -> None:
    """Replace relative paths that don't exist here with the run's absolute paths.

    The run may have been started in another folder. `values` are from the run's config.yaml.
    """
    for key in PATH_KEYS:
        relative, absolute = plain_at(stored, key, resolve=False), value_at(values, key)
        if is_absolute_of(absolute, relative) and not is_here(relative):
            OmegaConf.update(stored, key, absolute, merge=False)


def read_plain(file: Path) -> dict[str, Any]:
    """Return the YAML in `file` with interpolations as text; empty if it is missing or broken.

    Raises ConfigErrors for YAML aliases.
    """
    try:
        return {str(key): value for key, value in read_yaml(file).items()}
    except Hostile as error:
        raise ConfigErrors([Problem(KEY, str(error), "use another run")]) from None
    except Unreadable:
        return {}


def changes(stored: Path, config: DictConfig) -> list[str]:
    """Return a text for each key whose value differs between the stored config and `config`."""
    changed = changed_values(stored, config)
    # A rule's ratio is a reference to loraplus.ratio, which is already reported.
    others = [values for key, values in changed.items() if key.startswith("loraplus.") and not key.startswith(_RULES)]
    return [
        f"{key}: {old} -> {new}"
        for key, (old, new) in changed.items()
        if not (key.startswith(_RULES) and (old, new) in others)
    ]


def changed_values(stored: Path, config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Return {key: (stored value, value in `config`)} for each key whose values differ."""
    if not stored.is_file():
        return {}
    then = flat(read_plain(stored))  # interpolations are not resolved, because the file may be untrusted
    now = flat(plain_of(with_absolute_paths(config)))
    keys = [key for key in [*now, *(key for key in then if key not in now)] if key not in _NOT_OF_TRAINING]
    pairs = {key: (then.get(key, "not set"), now.get(key, "not set")) for key in keys}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def _interpolated(node: Any, path: str = "") -> str:
    """Return the key of the first interpolation in a config; empty if there is none."""
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        inside = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_interpolation(node, key):
            return inside
        value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if OmegaConf.is_config(value) and (found := _interpolated(value, inside)):
            return found
    return ""


def _moved(config: DictConfig, folder: Path) -> list[Problem]:
    """Return one Problem for all dotted paths of this package that no longer exist."""
    if not (names := moved_paths(OmegaConf.to_container(config))):
        return []
    what = f"its config names {', '.join(names)}, but this version has renamed these paths"
    adapter = folder / run_folder.ADAPTER
    fix = f"train its adapter further (adapter=existing adapter.path={adapter}), or load it with PEFT"
    return [Problem(KEY, what, fix)]
