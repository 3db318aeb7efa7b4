"""Open a finished run from its folder: config and result. `load_finished` loads its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.check import stored_problems
from loraplus_hydra.errors import ConfigErrors, Problem, first_line
from loraplus_hydra.io import run_folder
from loraplus_hydra.io.folders import refuse_links
from loraplus_hydra.io.read import Missing, Unreadable, read_json
from loraplus_hydra.io.result import OK, stored_result
from loraplus_hydra.runs.stored_config import KEY, read_stored

# What of a stored config is needed to rebuild the model, without training or rows.
MODEL_GROUPS = ("model", "quantization", "adapter", "task", "seed")
# What the task sets in a model's config, kept in the config.json beside the adapter.
_LABEL_SETTINGS = ("id2label", "label2id", "problem_type")
_NOT_RESULTS = ("runtime", "per_second", "preparation_time", "num_tokens", "epoch")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run's folder, config and result."""

    folder: Path
    config: DictConfig
    result: Mapping[str, Any]

    @property
    def adapter(self) -> Path:
        return self.folder / run_folder.ADAPTER

    def model_arguments(self) -> dict[str, Any]:
        """Return the settings that the task made in the model's config: labels and their kind."""
        file = self.adapter / "config.json"
        try:
            stored = read_json(file)
            found = {name: stored[name] for name in _LABEL_SETTINGS if stored.get(name) is not None}
            if "id2label" in found:
                found["id2label"] = {int(number): name for number, name in found["id2label"].items()}
                found["num_labels"] = len(found["id2label"])
        except Unreadable as error:
            raise _no_run(str(error)) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise _no_run(f"{file} can't be read: {first_line(error)}") from error
        return found


def model_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Drop timing and progress entries from an evaluation's metrics."""
    return {name: value for name, value in metrics.items() if not any(part in name for part in _NOT_RESULTS)}


def open_run(
    folder: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
    groups: Iterable[str] | None = MODEL_GROUPS,
) -> FinishedRun:
    """Open the finished run in `folder`, with `overrides` (group -> keys) merged into its config.

    Its config is checked like any other, in `groups` (None: all) and without its rows, since a folder may be untrusted.
    Its targets must be allowed at their places, and a model's own code runs only with `trust_remote_code`. Raises
    ConfigErrors.
    """
    place = Path(folder).expanduser()
    result = _result(place)
    config = read_stored(place / run_folder.CONFIG, overrides or {})
    problems = stored_problems(config, groups)
    if config.model.trust_remote_code and not trust_remote_code:
        what = "the run's model brings Python of its own (model.trust_remote_code)"
        problems.append(Problem("trust_remote_code", what, "read it, then set trust_remote_code=true"))
    if problems:
        raise ConfigErrors(problems)
    return FinishedRun(place, config, result)


def _result(folder: Path) -> dict[str, Any]:
    """Return a finished run's result.json. Raises ConfigErrors when the folder has none."""
    if not folder.is_dir():
        raise _no_run(f"there is no folder {folder}")
    if not (folder / run_folder.CONFIG).is_file():
        runs = sorted(path.parent.name for path in folder.glob(f"*/{run_folder.CONFIG}"))
        hint = f"it holds the runs {', '.join(runs[:5])}; name one" if runs else "name the folder of a finished run"
        raise _no_run(f"{folder} is no run's folder: there is no {run_folder.CONFIG} in it", hint)
    try:
        result = stored_result(folder)
    except Missing:
        raise _no_run(f"the run in {folder} hasn't finished: there is no {run_folder.RESULT}") from None
    except Unreadable as error:
        raise _no_run(str(error)) from None
    if (status := result.get("status")) != OK:
        stored = result.get("error") or {}
        why = f" ({stored.get('type')}: {str(stored.get('text')).splitlines()[0]})" if stored.get("text") else ""
        raise _no_run(f"the run in {folder} ended as '{status}'{why}")
    adapter = folder / run_folder.ADAPTER
    if adapter.is_symlink() or not adapter.is_dir():
        raise _no_run(
            f"there is no {run_folder.ADAPTER} in {folder}" + (", only a link" if adapter.is_symlink() else "")
        )
    refuse_links(adapter, KEY, reading=True)  # before other libraries open its files
    return result


def _no_run(what: str, fix: str = "name the folder of a finished run") -> ConfigErrors:
    return ConfigErrors([Problem(KEY, what, fix)])
