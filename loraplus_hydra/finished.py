"""A finished run, opened again from its folder: its config, its result, and its model with the adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra import paths
from loraplus_hydra.check.foreign import foreign_code
from loraplus_hydra.check.keys import read_config, unknown_keys
from loraplus_hydra.dotted import flat
from loraplus_hydra.errors import ConfigErrors, Problem, first_line
from loraplus_hydra.results import OK
from loraplus_hydra.schema import RunConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# What of a stored config is needed to rebuild the model, without training or rows.
MODEL_GROUPS = ("model", "quantization", "adapter", "task", "seed")
# What the task sets in a model's config, kept in the config.json beside the adapter.
_LABEL_SETTINGS = ("id2label", "label2id", "problem_type")
_NOT_RESULTS = ("runtime", "per_second", "preparation_time", "num_tokens", "epoch")
KEY = "run"
_RESOLVER = re.compile(r"\$\{[^}]*:")  # ${oc.env:HOME}


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder with its whole config and what result.json says."""

    folder: Path
    config: DictConfig
    result: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        return self.folder / paths.ADAPTER

    def model_arguments(self) -> dict[str, Any]:
        """What the task has set in the model's config: the labels' names and their kind."""
        file = self.adapter / "config.json"
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            found = {name: stored[name] for name in _LABEL_SETTINGS if stored.get(name) is not None}
            if "id2label" in found:
                found["id2label"] = {int(number): name for number, name in found["id2label"].items()}
                found["num_labels"] = len(found["id2label"])
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise _no_run(f"{file} can't be read: {first_line(error)}") from error
        return found


def unnamed_run(config: DictConfig) -> list[Problem]:
    """What is wrong when a command is given no run's folder."""
    missing = OmegaConf.is_missing(config, "run")
    return [Problem(KEY, "no run is named", "write its folder behind the command")] if missing else []


def named_run(config: DictConfig) -> str:
    """The run's folder that a command is given. Raises ConfigErrors when it is given none."""
    if problems := unnamed_run(config):
        raise ConfigErrors(problems)
    return str(config.run)


def results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What of an evaluation's metrics is about the model: not how long it took, nor how far training had come."""
    return {name: value for name, value in metrics.items() if not any(part in name for part in _NOT_RESULTS)}


def open_run(
    folder: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
    groups: Iterable[str] | None = MODEL_GROUPS,
) -> FinishedRun:
    """The finished run in `folder`, with `overrides` (group -> keys) merged into its config.

    Its config is checked like any other, in `groups` (None: everywhere) and without its rows, since a folder may come
    from anybody: what it names must be of the kind that its place expects, and code that came with a model runs only
    with `trust_remote_code`. Raises ConfigErrors.
    """
    place = Path(folder).expanduser()
    result = _result(place)
    config = read_stored(place / paths.CONFIG, overrides or {})
    from loraplus_hydra.check import stored_problems

    problems = stored_problems(config, groups)
    if config.model.trust_remote_code and not trust_remote_code:
        what = "the run's model brings Python of its own (model.trust_remote_code)"
        problems.append(Problem("trust_remote_code", what, "read it, then set trust_remote_code=true"))
    if problems:
        raise ConfigErrors(problems)
    return FinishedRun(place, config, result)


def load_run(run: FinishedRun, *, trainable: bool = False) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The run's model with its adapter, and the tokenizer that was saved with it. Raises UserError."""
    from transformers import set_seed

    from loraplus_hydra.adapter_folder import attach, stored_adapter
    from loraplus_hydra.model import load_base
    from loraplus_hydra.quiet import quiet_loading

    quiet_loading()
    stored = stored_adapter(str(run.adapter), key=KEY)
    tokenizer = load_run_tokenizer(run)
    # Rows of new tokens and a new head: all of them are the adapter's, but some are drawn first.
    set_seed(run.config.seed)
    base = load_base(run.config, tokenizer, run.model_arguments())
    base.config.use_cache = True
    model = attach(base, stored, trainable=trainable)
    model.eval()
    return model, tokenizer


def load_run_tokenizer(run: FinishedRun) -> PreTrainedTokenizerBase:
    """The tokenizer beside the run's adapter: its new tokens, pad token and template are in it."""
    from loraplus_hydra.tokenizer import load_tokenizer

    model = run.config.model.copy()
    model.tokenizer, model.add_tokens, model.pad_token, model.revision = str(run.adapter.absolute()), [], None, None
    return load_tokenizer(model)


def _result(folder: Path) -> dict[str, Any]:
    """result.json of a run that is finished, or ConfigErrors saying what the folder is instead."""
    if not folder.is_dir():
        raise _no_run(f"there is no folder {folder}")
    if not (folder / paths.CONFIG).is_file():
        runs = sorted(path.parent.name for path in folder.glob(f"*/{paths.CONFIG}"))
        hint = f"it holds the runs {', '.join(runs[:5])}; name one" if runs else "name the folder of a finished run"
        raise _no_run(f"{folder} is no run's folder: there is no {paths.CONFIG} in it", hint)
    try:
        result = json.loads((folder / paths.RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _no_run(f"the run in {folder} hasn't finished: there is no {paths.RESULT}") from None
    except (ValueError, OSError) as error:
        raise _no_run(f"{folder / paths.RESULT} can't be read: {error}") from None
    if not isinstance(result, dict) or result.get("status") != OK:
        status = result.get("status") if isinstance(result, dict) else "unknown"
        told = (result.get("error") or {}) if isinstance(result, dict) else {}
        why = f" ({told.get('type')}: {str(told.get('text')).splitlines()[0]})" if told.get("text") else ""
        raise _no_run(f"the run in {folder} ended as '{status}'{why}")
    if not (folder / paths.ADAPTER).is_dir():
        raise _no_run(f"there is no {paths.ADAPTER} in {folder}")
    return result


def _no_run(what: str, fix: str = "name the folder of a finished run") -> ConfigErrors:
    return ConfigErrors([Problem(KEY, what, fix)])


def read_stored(file: Path, overrides: Mapping[str, Any]) -> DictConfig:
    """The stored config in `file` with `overrides` (group -> keys), as the schema types it. Raises ConfigErrors.

    Also when it names code that lies in the run's own folder.
    """
    hydras = file.parent.name == paths.HYDRA  # Hydra's copy, as it was asked for; it lies one folder deeper
    try:
        _refuse_aliases(file)
        stored = OmegaConf.load(file)
    except ConfigErrors:
        raise
    except Exception as error:  # YAML's errors have no base that omegaconf lets us name
        raise ConfigErrors([Problem(KEY, f"{file} can't be read: {error}", "name another run")]) from None
    if not isinstance(stored, DictConfig):
        raise ConfigErrors([Problem(KEY, f"{file} holds a list, not a config", "name another run")])
    if not hydras and (key := _interpolated(stored)):
        what = f"{file}: {key} is an interpolation, which no run writes: it could read your environment"
        raise ConfigErrors([Problem(KEY, what, "write the value in its place")])
    stored.pop("sweep", None)  # of the program, not of the run
    if hydras:
        _put_values_for_resolvers(stored, file.parent.parent / paths.CONFIG)
    schema = OmegaConf.structured(RunConfig)
    changes = {group: dict(keys) for group, keys in overrides.items() if keys}
    try:
        # Untyped first, so that every key that nobody knows is told at once.
        config = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(schema)), stored, changes)
        assert isinstance(config, DictConfig)
        if problems := _unknown(config):
            raise ConfigErrors(problems)
        typed = OmegaConf.merge(schema, config)
    except OmegaConfBaseException as error:
        first = first_line(error)
        raise ConfigErrors([Problem(str(getattr(error, "full_key", None) or KEY), first, f"see {file}")]) from None
    assert isinstance(typed, DictConfig)
    if problems := foreign_code(read_config(typed)[0], file.parent.parent if hydras else file.parent):
        raise ConfigErrors(problems)
    return typed


def _put_values_for_resolvers(stored: DictConfig, resolved: Path) -> None:
    """Replace each `${resolver:...}` by the value that it had in the run: followed here it could read your environment.

    Raises ConfigErrors where the run's own config.yaml doesn't have it.
    """
    plain: Any = OmegaConf.to_container(stored)
    values = flat(read_plain(resolved))
    for key, value in flat(plain).items():
        if not _RESOLVER.search(str(value)):
            continue
        if key not in values or _RESOLVER.search(str(values[key])):
            what = f"{key} is {value}, which is not followed, and {resolved} doesn't say what it was"
            raise ConfigErrors([Problem(KEY, what, "write the value in its place")])
        OmegaConf.update(stored, key, values[key])


def read_plain(file: Path) -> dict[str, Any]:
    """The YAML in `file` as plain containers, nothing followed; nothing where it is missing, cut short or no mapping.

    Raises ConfigErrors for one whose parts stand for others.
    """
    if not file.is_file():
        return {}
    try:
        _refuse_aliases(file)
        plain = OmegaConf.to_container(OmegaConf.load(file))
    except ConfigErrors:
        raise
    except Exception:  # YAML's errors have no base that omegaconf lets us name
        return {}
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _interpolated(node: Any, path: str = "") -> str:
    """The key of the first interpolation in a config, or nothing."""
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        inside = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_interpolation(node, key):
            return inside
        value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if OmegaConf.is_config(value) and (found := _interpolated(value, inside)):
            return found
    return ""


def _refuse_aliases(file: Path) -> None:
    """Raise ConfigErrors for a YAML whose parts stand for others: a few lines of that can fill any memory."""
    import yaml  # type: ignore[import-untyped]

    with file.open(encoding="utf-8") as stream:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(stream, Loader=yaml.SafeLoader)):
            raise ConfigErrors([Problem(KEY, f"{file} holds YAML aliases, which no run writes", "name another run")])


def _unknown(config: DictConfig) -> list[Problem]:
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return unknown_keys({str(key): value for key, value in plain.items()}, OmegaConf.create())
