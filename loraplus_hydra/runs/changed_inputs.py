"""Comparison of a run's inputs with the inputs that it stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.identity import ALLOW, config_hash
from loraplus_hydra.data.fingerprint import fingerprints
from loraplus_hydra.data.rows import load_rows
from loraplus_hydra.errors import first_line
from loraplus_hydra.io import run_folder, screen
from loraplus_hydra.io.checkpoint_state import StreamState
from loraplus_hydra.io.checkpoints import Checkpoint, ResumePoint
from loraplus_hydra.io.fingerprints import NOT_STORED, OF_ROWS, changed_inputs, refuse_changed
from loraplus_hydra.io.result import Result
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.new_rows import changed_rows
from loraplus_hydra.runs.stored_config import changed_values, read_plain
from loraplus_hydra.training.prepare import inputs_of, prepare_examples

_kept: dict[str, dict[str, str]] = {}  # by start of a sweep and hash of the keys that set the inputs; at most one entry
_noted: set[str | None] = set()  # starts of a sweep for which the note about missing fingerprints was shown


def with_inputs(point: ResumePoint, config: DictConfig, accepted: Result | None) -> ResumePoint:
    """Return `point` with the fingerprints of `config`'s inputs, and the fingerprints to expect.

    `accepted` is the stored result with the changed inputs that an earlier resume was allowed to use. Raises
    ConfigErrors for each input that has changed.
    """
    checkpoint = point.checkpoint
    assert checkpoint is not None
    now = point.inputs or current_inputs(config)
    if not checkpoint.state.inputs:
        return _with_messages(replace(point, inputs=now), f"Note: {NOT_STORED}")
    new_rows = point.new_rows | _new_rows(checkpoint, config)
    point = replace(point, inputs=now, new_rows=new_rows)  # Hydra replaces its copy of the config later
    expected = {
        name: then
        for name, then in checkpoint.state.inputs.items()
        if name not in new_rows and not _is_accepted(name, now, accepted)
    }
    stream = StreamState() if "data.train" in new_rows else checkpoint.state.stream
    if config[ALLOW]:
        return _with_messages(point, *(f"Changed since: {text}" for text in changed_inputs(expected, now)))
    refuse_changed(expected, now)
    return replace(point, expected=expected, stream=stream)


def _with_messages(point: ResumePoint, *messages: str) -> ResumePoint:
    # A point that was found before has its messages already.
    return replace(point, messages=tuple(dict.fromkeys((*point.messages, *messages))))


def current_inputs(config: DictConfig) -> dict[str, str]:
    """Return the fingerprints of a checked config's inputs. Its rows are cached for the run."""
    tokenizer = load_tokenizer(config.model)
    return inputs_of(config, tokenizer, prepare_examples(config, tokenizer, keep=True).fingerprints)


def refuse_other_inputs(config: DictConfig, result: Result, *, start: str | None = None) -> None:
    """Raise ConfigErrors if the inputs of `config` have changed since the run with this config finished.

    If the inputs can't be compared, a note is shown. Jobs of one `start` of a sweep read the same inputs only once.
    """
    if config[ALLOW]:
        return
    if not result.inputs:
        if start is None or start not in _noted:
            screen.show(f"    Note: {NOT_STORED}")
        _noted.add(start)
        return
    try:
        now = _inputs_to_compare(config, start)
    except Exception as error:  # the rows, or the function that makes them, may no longer exist
        screen.show(f"    Note: rows and weights can't be checked for changes: {first_line(error)}")
        return
    refuse_changed(result.inputs, now)


def _inputs_to_compare(config: DictConfig, start: str | None) -> dict[str, str]:
    """Return the fingerprints of a config's inputs, cached for the next job of the sweep's start."""
    named = {name: OmegaConf.to_container(config[name], resolve=True) for name in ("model", "data")}
    named |= {"adapter": config.adapter.get("path"), "template": config.task.args.get("chat_template_path")}
    key = f"{start} {config_hash(named)}"
    if start is None or key not in _kept:
        _kept.clear()
        _kept[key] = inputs_of(config, load_tokenizer(config.model), fingerprints(load_rows(config.data)))
    return _kept[key]


def _is_accepted(name: str, now: Mapping[str, str], accepted: Result | None) -> bool:
    return accepted is not None and name in now and accepted.inputs.get(name) == now[name]


def _new_rows(checkpoint: Checkpoint, config: DictConfig) -> frozenset[str]:
    """Return which of OF_ROWS are named, or read, in another way than by the checkpoint's run.

    Paths are compared as text, because the folder of the run and of relative paths may have been moved.
    """
    folder = checkpoint.folder.parent.parent
    stored = folder / run_folder.CONFIG
    if not stored.is_file():
        return frozenset(OF_ROWS)
    composed = read_plain(folder / run_folder.HYDRA / run_folder.CONFIG).get("data") or {}
    text = OmegaConf.to_container(config.data, resolve=False)
    assert isinstance(text, dict)
    # A key of `data` with a mapping has several values
    differing = {key.split(".")[1] for key in changed_values(stored, config) if key.startswith("data.")}
    keys = [key for key in differing if key not in composed or composed[key] != text.get(key)]
    return changed_rows(keys, read_plain(stored).get("data") or {}, config.data)
