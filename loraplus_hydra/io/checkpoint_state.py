"""The JSON files of a checkpoint. They are validated when read, since a checkpoint may be untrusted."""

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
STATE = "run_state.json"  # what the Trainer's own files lack: see training/hf_trainer/checkpoint_callback.py
TRAINER_STATE = "trainer_state.json"  # as the Trainer names it
_LARGEST_TRAINER_STATE = 2**29  # bytes; it has an entry for each logged step

_LOSSES = Range("a loss for each process", lambda losses: losses and all(map(FINITE.holds, losses)))
_STEPS_LOGGED = Range("entries with a step", lambda log: all(_is_whole(entry.get("step")) for entry in log))
_CALLBACKS = Range("callbacks' arguments and attributes", lambda kept: all(map(_is_callback, kept.values())))


@dataclass(frozen=True)
class LogWindow:
    """The part of training that no line of the log has yet."""

    losses: list[float] = field(metadata=range_(_LOSSES))  # a sum for each process
    since_step: int = field(metadata=range_(WHOLE))  # the last step with a line in the log
    total: float = field(metadata=range_(FINITE))  # the sum of all logged losses
    # Metrics that TRL has not logged. Some are NaN: a batch had nothing to measure.
    trl: dict[str, float | dict[str, list[float]]]


@dataclass(frozen=True)
class GroupState:
    """A parameter group: names of its tensors, and its settings."""

    tensors: list[str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class ScheduleState:
    """The learning-rate schedule: full name of its class or function, and its arguments."""

    is_: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class StreamState:
    """The rows that the current pass over streamed training rows has read, with those that are read ahead."""

    count: int = field(default=0, metadata=range_(WHOLE))  # 0 also without a stream, or where worker processes read it
    digest: str = ""


@dataclass(frozen=True)
class RunState:
    """run_state.json. JSON keys are an interface: change one only with a line in the CHANGELOG."""

    step: int = field(metadata=range_(COUNT))
    seconds: float = field(metadata=range_(NOT_NEGATIVE))  # of training so far
    metrics_bytes: int = field(metadata=range_(WHOLE))  # length of metrics.jsonl
    window: LogWindow
    optimizer: str  # full name of its class
    groups: dict[str, GroupState]
    schedule: ScheduleState
    max_steps: int = field(metadata=range_(COUNT))
    evaluation_due: bool = False  # True where a signal stopped this step's evaluation
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints, see io/fingerprints.py
    stream: StreamState = StreamState()


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
    """Return the run_state.json of a checkpoint. Raises ValueError if no run writes it so."""
    state = _build(RunState, read_json(folder / STATE), STATE)
    if state.window.since_step > state.step:
        raise ValueError(f"its {STATE} isn't as it was written: window")
    return state


def write_run_state(folder: Path, state: RunState) -> None:
    """Write a checkpoint's run_state.json."""
    write_text(folder / STATE, json.dumps(to_plain(state), indent=2) + "\n")


def trainer_state(folder: Path) -> StoredTrainerState:
    """Return the trainer_state.json of a checkpoint. Raises ValueError if no Trainer can resume from it."""
    from transformers import TrainerState  # takes seconds, and `io` imports no torch

    plain = read_json(folder / TRAINER_STATE, largest=_LARGEST_TRAINER_STATE)
    if unknown := sorted(plain.keys() - {each.name for each in dataclasses.fields(TrainerState)}):
        raise ValueError(f"its {TRAINER_STATE} has a key that this transformers doesn't know: {unknown[0]}")
    return _build(StoredTrainerState, plain, TRAINER_STATE)


def _build(schema: type[T], plain: Any, name: str) -> T:
    try:
        return from_plain(schema, plain)
    except ValueError as error:
        raise ValueError(f"its {name} isn't as it was written: {error}") from None


def _is_callback(kept: Any) -> bool:
    """Return True for the stored state of a callback, or of several of one class."""
    each = kept if isinstance(kept, list) else [kept]
    return all(fits(one, dict[str, dict[str, Any]]) and {"args", "attributes"} <= one.keys() for one in each) and all(
        _is_whole(one["attributes"].get("early_stopping_patience_counter", 0)) for one in each
    )


def _is_whole(value: Any) -> bool:
    return fits(value, int) and value >= 0
