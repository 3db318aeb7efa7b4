"""The JSON files of a checkpoint, validated when they are read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from loraplus_hydra.config.types import COUNT, FINITE, NOT_NEGATIVE, WHOLE, Range, fits, from_plain, range_, to_plain
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.read import read_json

T = TypeVar("T")
STATE = "run_state.json"  # state that the Trainer's own files don't have
TRAINER_STATE = "trainer_state.json"  # the Trainer's name of the file
_LARGEST_TRAINER_STATE = 2**29  # bytes; the file has an entry for each logged step

_LOSSES = Range("a loss for each process", lambda losses: losses and all(map(FINITE.holds, losses)))
_STEPS_LOGGED = Range("entries with a step", lambda log: all(_is_whole(entry.get("step")) for entry in log))
_CALLBACKS = Range("callbacks' arguments and attributes", lambda kept: all(map(_is_callback, kept.values())))


@dataclass(frozen=True)
class LogWindow:
    """Values since the last line of the log, which the next line needs."""

    losses: list[float] = field(metadata=range_(_LOSSES))  # the sum of the losses in each process
    since_step: int = field(metadata=range_(WHOLE))  # the last step with a line in the log
    total: float = field(metadata=range_(FINITE))  # the sum of all logged losses
    # Metrics that TRL has not logged yet. A metric is NaN for a batch that had nothing to measure.
    trl: dict[str, float | dict[str, list[float]]]


@dataclass(frozen=True)
class GroupState:
    """A parameter group: its tensors' names and its settings."""

    tensors: list[str]  # names, in the optimizer's order
    settings: dict[str, Any]  # lr, weight_decay and the optimizer's other settings


@dataclass(frozen=True)
class ScheduleState:
    """The learning-rate schedule: its class or function by full name, and its arguments."""

    is_: str  # full name
    arguments: dict[str, Any]  # by name


@dataclass(frozen=True)
class StreamState:
    """The streamed training rows that the current epoch has read so far, including rows read in advance."""

    # number of rows; 0 also without a stream, or if worker processes read the stream
    count: int = field(default=0, metadata=range_(WHOLE))
    digest: str = ""  # hash of the rows


@dataclass(frozen=True)
class RunState:
    """The content of run_state.json. Its keys are an interface: a change needs a line in the CHANGELOG."""

    step: int = field(metadata=range_(COUNT))  # optimizer steps taken
    seconds: float = field(metadata=range_(NOT_NEGATIVE))  # seconds of training so far
    metrics_bytes: int = field(metadata=range_(WHOLE))  # length of metrics.jsonl
    window: LogWindow  # values since the last line of the log
    optimizer: str  # full name of its class
    groups: dict[str, GroupState]  # parameter groups by name
    schedule: ScheduleState  # the learning-rate schedule
    max_steps: int = field(metadata=range_(COUNT))  # steps of the whole run
    evaluation_due: bool = False  # True if a signal stopped this step's evaluation
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of the inputs, see io/fingerprints.py
    stream: StreamState = StreamState()  # streamed rows that were read


@dataclass(frozen=True)
class StoredTrainerState:
    """The entries of trainer_state.json that a resume depends on."""

    global_step: int = field(metadata=range_(COUNT))
    epoch: float = field(metadata=range_(NOT_NEGATIVE))
    max_steps: int = field(metadata=range_(COUNT))
    num_train_epochs: int = field(metadata=range_(WHOLE))
    num_input_tokens_seen: float = field(metadata=range_(NOT_NEGATIVE))
    total_flos: float = field(metadata=range_(NOT_NEGATIVE))
    log_history: list[dict[str, Any]] = field(metadata=range_(_STEPS_LOGGED))
    stateful_callbacks: dict[str, Any] = field(metadata=range_(_CALLBACKS))
    logging_steps: float | None = field(default=None, metadata=range_(NOT_NEGATIVE))
    eval_steps: float | None = field(default=None, metadata=range_(NOT_NEGATIVE))
    save_steps: float | None = field(default=None, metadata=range_(NOT_NEGATIVE))
    train_batch_size: int | None = field(default=None, metadata=range_(COUNT))
    best_global_step: int | None = field(default=None, metadata=range_(WHOLE))
    best_metric: float | None = None
    best_model_checkpoint: str | None = None


def run_state(folder: Path) -> RunState:
    """Return the run_state.json of a checkpoint. Raises ValueError if its content is invalid."""
    state = _build(RunState, read_json(folder / STATE), STATE)
    if state.window.since_step > state.step:
        raise ValueError(f"its {STATE} has an invalid value: window")
    return state


def write_run_state(folder: Path, state: RunState) -> None:
    """Write a checkpoint's run_state.json."""
    write_text(folder / STATE, json.dumps(to_plain(state), indent=2) + "\n")


def trainer_state(folder: Path) -> StoredTrainerState:
    """Return the trainer_state.json of a checkpoint. Raises ValueError if its content is invalid."""
    from transformers import TrainerState  # takes seconds, and `io` must not import torch

    plain = read_json(folder / TRAINER_STATE, largest=_LARGEST_TRAINER_STATE)
    if unknown := sorted(plain.keys() - {each.name for each in dataclasses.fields(TrainerState)}):
        raise ValueError(f"its {TRAINER_STATE} has a key that this transformers doesn't know: {unknown[0]}")
    return _build(StoredTrainerState, plain, TRAINER_STATE)


def _build(schema: type[T], plain: Any, name: str) -> T:
    try:
        return from_plain(schema, plain)
    except ValueError as error:
        raise ValueError(f"its {name} has an invalid value: {error}") from None


def _is_callback(kept: Any) -> bool:
    """Return True for the stored state of a callback, or of several callbacks of one class."""
    each = kept if isinstance(kept, list) else [kept]
    return all(fits(one, dict[str, dict[str, Any]]) and {"args", "attributes"} <= one.keys() for one in each) and all(
        _is_whole(one["attributes"].get("early_stopping_patience_counter", 0)) for one in each
    )


def _is_whole(value: Any) -> bool:
    return fits(value, int) and value >= 0
