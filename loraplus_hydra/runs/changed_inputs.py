"""Compare the inputs of a run that resumes with those of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.identity import ALLOW
from loraplus_hydra.io import run_folder
from loraplus_hydra.io.checkpoint_state import StreamState
from loraplus_hydra.io.checkpoints import Checkpoint, ResumePoint
from loraplus_hydra.io.fingerprints import NOT_STORED, OF_ROWS, changed_inputs, refuse_changed
from loraplus_hydra.io.result import Result
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.stored_config import changes, read_plain
from loraplus_hydra.training.prepare import inputs_of, prepare_examples


def with_inputs(point: ResumePoint, config: DictConfig, accepted: Result | None) -> ResumePoint:
    """Return `point` with the inputs of `config`, those that must be the checkpoint's, and messages on the others.

    `accepted` is the stored result, which has the inputs that an earlier resume was allowed to use. Raises
    ConfigErrors naming each input that has changed.
    """
    checkpoint = point.checkpoint
    assert checkpoint is not None
    now = current_inputs(config)
    if not checkpoint.state.inputs:
        return replace(point, inputs=now, messages=(*point.messages, f"Note: {NOT_STORED}"))
    names_new_rows = point.names_new_rows or not _names_the_same_rows(checkpoint, config)
    expected = {
        name: then
        for name, then in checkpoint.state.inputs.items()
        if not (names_new_rows and name in OF_ROWS) and not _is_accepted(name, now, accepted)
    }
    stream = StreamState() if names_new_rows else checkpoint.state.stream
    if config[ALLOW]:
        messages = (f"Changed since: {text}" for text in changed_inputs(expected, now))
        return replace(point, inputs=now, messages=(*point.messages, *messages))
    refuse_changed(expected, now)
    return replace(point, inputs=now, expected=expected, stream=stream)


def current_inputs(config: DictConfig) -> dict[str, str]:
    """Return the fingerprints of a checked config's inputs. Its rows stay loaded for the run."""
    tokenizer = load_tokenizer(config.model)
    return inputs_of(config, tokenizer, prepare_examples(config, tokenizer, keep=True))


def _is_accepted(name: str, now: Mapping[str, str], accepted: Result | None) -> bool:
    return accepted is not None and name in now and accepted.inputs.get(name) == now[name]


def _names_the_same_rows(checkpoint: Checkpoint, config: DictConfig) -> bool:
    """Return True if `config` names its rows as the checkpoint's run did.

    A run's own command has the same text, also where its folder and relative paths have moved.
    """
    folder = checkpoint.folder.parent.parent
    stored = folder / run_folder.CONFIG
    if not stored.is_file():
        return False
    composed = read_plain(folder / run_folder.HYDRA / run_folder.CONFIG).get("data")
    is_same_text = composed == OmegaConf.to_container(config.data, resolve=False)
    return is_same_text or not any(change.startswith("data.") for change in changes(stored, config))
