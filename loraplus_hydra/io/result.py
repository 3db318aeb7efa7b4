"""The result of a run, stored in result.json even if the run failed."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraplus_hydra.config.types import field_types, fits
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.read import Unreadable, read_json
from loraplus_hydra.io.run_folder import RESULT

OK, FAILED, INTERRUPTED = "ok", "failed", "interrupted"
WAITING, PRUNED = "waiting", "pruned"  # stopped at a rung of successive halving: not yet decided; left the search
_CHECKED = ("status", "metric", "metrics", "metrics_before", "error", "steps", "config_hash", "inputs", "resumed_at")
_OF_EVERY_RUN = ("metric", "metrics", "metrics_before")  # the keys that a successful run has
_LIBRARIES = (
    "loraplus_hydra",
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
)


@dataclass
class Result:
    """The result of a run.

    The JSON keys are an interface: a change needs a line in the CHANGELOG.
    """

    status: str  # ok | failed | interrupted | waiting | pruned
    metric: str  # name of the metric that a sweep optimises
    metrics: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    metrics_before: dict[str, float] = field(default_factory=dict)  # those of the evaluation before the first step
    best: dict[str, Any] = field(default_factory=dict)  # step and value of the best evaluation, compared by `metric`
    train_loss: float | None = None  # mean training loss over all steps
    steps: int = 0  # optimizer steps taken
    seconds: float = 0.0  # seconds of the whole run
    train_seconds: float = 0.0  # seconds of training, including evaluations during training
    tokens_per_second: float | None = None  # of training steps since the run's last start, without evaluations
    peak_memory_bytes: int = 0  # GPU memory allocated, or the process's resident memory on a CPU
    device: str = ""  # torch's name of the device
    trained_parameters: int = 0  # number of trained parameters
    total_parameters: int = 0  # number of all parameters
    seed: int = 0  # the key `seed` of the config
    config_hash: str = ""  # hash of the resolved config
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of rows, weights, ...: see io/fingerprints.py
    versions: dict[str, str] = field(default_factory=dict)  # of Python and of the libraries
    samples: list[dict[str, str]] = field(default_factory=list)  # prompt, reference, answers before and after training
    error: dict[str, str] | None = None  # type and text of a failed run's error
    resumed_at: list[int] = field(default_factory=list)  # steps of the checkpoints that the run resumed from

    @property
    def value(self) -> float | None:
        """The value of the metric that a sweep optimises; None if the run has no such value."""
        return self.metrics.get(self.metric)

    def write(self, folder: Path) -> None:
        """Write result.json into `folder` atomically. NaN and infinities become null."""
        write_text(folder / RESULT, json.dumps(finite(asdict(self)), indent=2, ensure_ascii=False) + "\n")


def stored_result(folder: Path) -> dict[str, Any]:
    """Return the JSON of the result in `folder`. Raises Missing, or Unreadable if its content is invalid."""
    file = folder / RESULT
    stored: dict[str, Any] = read_json(file)
    for name in _CHECKED:
        if name in stored and not fits(_without_null(stored[name]), field_types(Result)[name][0]):
            raise Unreadable(f"{file} can't be read: its '{name}' is invalid")
    if stored.get("status") == OK and (missing := [name for name in _OF_EVERY_RUN if name not in stored]):
        raise Unreadable(f"{file} can't be read: it has no '{missing[0]}'")
    return stored


def read_result(folder: Path) -> Result | None:
    """Return the result stored in `folder`; None if it can't be read."""
    try:
        stored = stored_result(folder)
        return Result(**{each.name: stored[each.name] for each in fields(Result) if each.name in stored})
    except (Unreadable, TypeError):  # TypeError: a required key is missing
        return None


def recorded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a result's JSON that have the type of their key.

    Another version of this program may have written the others.
    """
    kinds = field_types(Result)
    return {key: value for key, value in stored.items() if key in kinds and fits(_without_null(value), kinds[key][0])}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _without_null(value: Any) -> Any:
    """Return `value` without the nulls that replace numbers that aren't finite."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has neither NaN nor infinity
    return value
