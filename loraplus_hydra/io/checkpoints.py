"""Complete and incomplete checkpoints.

A checkpoint is complete if it has a manifest that agrees with its files. The manifest is written last and lists every
file with its size and hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from loraplus_hydra.io.checkpoint_state import STATE, TRAINER_STATE, RunState, StreamState, run_state, trainer_state
from loraplus_hydra.io.files import open_regular, remove, write_text
from loraplus_hydra.io.folders import remove_folder
from loraplus_hydra.io.read import Unreadable, read_bytes, read_json, read_or

MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # the Trainer's names of the files
_FOLDER = re.compile(r"checkpoint-(\d+)")
_LARGEST_MANIFEST = 2**24  # bytes; a checkpoint has some dozens of files
# Pickles that PEFT or transformers would open if safetensors are missing. The Trainer's own state (optimizer.pt,
# scheduler.pt, ...) is read by torch with `weights_only=True`.
_PICKLED_WEIGHTS = (".bin", ".pkl", ".pickle", ".ckpt")

KEY = "trainer.resume_from_checkpoint"
AUTO = "auto"  # value of trainer.resume_from_checkpoint: the newest complete checkpoint in the run's own folder


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and its run_state.json."""

    folder: Path
    state: RunState
    manifest: bytes = b""  # the content with which every file was compared

    @property
    def step(self) -> int:
        """The optimizer step of the checkpoint."""
        return self.state.step

    def is_unchanged(self) -> bool:
        """Return True if the manifest has not changed since the files were compared with it."""
        return read_or(None, read_bytes, self.folder / MANIFEST) == self.manifest


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from. Without a checkpoint, the run starts at step 0 in a used folder."""

    checkpoint: Checkpoint | None
    changed: tuple[str, ...] = ()  # texts, one for each key that differs from the run's stored config
    messages: tuple[str, ...] = ()  # messages for the user, such as about newer, incomplete checkpoints
    new_rows: frozenset[str] = frozenset()  # which of OF_ROWS the command replaces
    inputs: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the inputs to resume with
    expected: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the inputs that must be unchanged
    stream: StreamState = field(default_factory=StreamState)  # the stream's rows that must be the same again

    @property
    def folder(self) -> str | None:
        """The checkpoint's folder as a string, or None, as the Trainer expects it."""
        return None if self.checkpoint is None else str(self.checkpoint.folder)

    @property
    def step(self) -> int:
        """The optimizer step of the checkpoint; 0 without a checkpoint."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def seconds(self) -> float:
        """Seconds of training before the checkpoint was written."""
        return 0.0 if self.checkpoint is None else self.checkpoint.state.seconds


def seal(folder: Path) -> None:
    """Make a checkpoint complete by writing its manifest. All other files must exist."""
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder) if path.name != MANIFEST}
    listed = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in sorted(files.items())}
    write_text(folder / MANIFEST, json.dumps({"files": listed}, indent=2) + "\n")


def unseal(folder: Path) -> None:
    """Remove a checkpoint, its manifest first. If it is a link, only the link is removed."""
    if not folder.is_symlink():
        remove(folder / MANIFEST)
    remove_folder(folder)


def defect(folder: Path) -> str:
    """Return why the checkpoint in `folder` is incomplete; empty for a complete checkpoint."""
    try:
        return _defect(folder)
    except OSError as error:
        return f"it can't be read: {error}"
    except RecursionError:
        return "its folders are nested too deeply"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`. Raises ValueError with the reason if the checkpoint is incomplete."""
    manifest = read_or(b"", read_bytes, folder / MANIFEST)
    if why := defect(folder):
        raise ValueError(why)
    state = run_state(folder)
    if step_of(folder) not in (state.step, -1):
        raise ValueError(f"its {STATE} is of step {state.step}")
    if (trainers := trainer_state(folder).global_step) != state.step:
        raise ValueError(f"its {STATE} is of step {state.step}, and its {TRAINER_STATE} of step {trainers}")
    # Without this file the Trainer would silently resume with other random numbers.
    processes = len(state.window.losses)
    for name in ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]:
        if not (folder / name).is_file():
            raise ValueError(f"it has no {name}")
    return Checkpoint(folder, state, manifest)


def newest_complete(folder: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Return the newest complete checkpoint, and a message for each newer, incomplete one.

    `folder` is the run's folder checkpoints/.
    """
    passed_over: list[str] = []
    for place in sorted(_named_after_steps(folder), key=step_of, reverse=True):
        try:
            return open_checkpoint(place), tuple(passed_over)
        except ValueError as why:
            passed_over.append(f"Skipped {place}: {why}")
    return None, tuple(passed_over)


def in_order(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints in `folder`, sorted by step. Links are omitted."""
    return sorted([path for path in _named_after_steps(folder) if not path.is_symlink()], key=step_of)


def sealed(folder: Path) -> list[Path]:
    """Return the folders of checkpoints that have a manifest, sorted by step. Their files are not checked."""
    return [path for path in in_order(folder) if (path / MANIFEST).is_file()]


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder; -1 for any other name."""
    matched = _FOLDER.fullmatch(folder.name)
    return int(matched[1]) if matched else -1


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `keep` remain.

    None keeps all. The newest checkpoint and `best` are never removed.
    """
    present = in_order(folder)
    if keep is None or keep <= 0:
        return
    spared = {path.name for path in present[-1:]}
    if best is not None:
        spared |= {path.name for path in present if path.name == Path(best).name}
    surplus = len(present) - max(keep, len(spared))
    for place in [path for path in present if path.name not in spared][: max(0, surplus)]:
        unseal(place)


def _defect(folder: Path) -> str:
    if folder.is_symlink():
        return "it is a link; name the folder itself"
    if not folder.is_dir():
        return "there is no such folder"
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}, so it is incomplete"
    if manifest.stat().st_size > _LARGEST_MANIFEST:
        return f"its {MANIFEST} is too large to be a manifest"
    try:
        files = read_json(manifest)["files"]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except Unreadable as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} can't be read: {type(error).__name__}: {error}"
    for name in listed:
        if why := _bad_name(folder, name):
            return why
    there = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    for name in sorted(there ^ listed.keys()):
        return f"{name} is {'not in the manifest' if name in there else 'missing'}"
    for name in (ADAPTER_WEIGHTS, STATE, TRAINER_STATE, *_optimizer_files(listed)):
        if name not in listed:
            return f"it has no {name}"
    for name, (size, digest) in listed.items():
        if (folder / name).stat().st_size != size:
            return f"{name} is {(folder / name).stat().st_size} bytes long, not {size}"
        if _sha256(folder / name) != digest:
            return f"{name} has changed since it was written: its hash differs"
    return ""


def _bad_name(folder: Path, name: str) -> str:
    """Return the error in a file name of a manifest; empty if it is valid.

    Invalid are names outside the folder, links, and pickles.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        return f"its manifest lists {name!r}, which is outside the folder"
    links = [part for part in (folder / name, *(folder / name).parents) if part.is_symlink()]
    if any(folder in link.parents for link in links):
        return f"{name} is a link"
    if (folder / name).exists() and not (folder / name).is_file():
        return f"{name} is not a regular file"
    if name.endswith(_PICKLED_WEIGHTS):
        return f"{name} holds pickled weights; only safetensors are read, since a pickle can run code"
    return ""


def _optimizer_files(listed: Collection[str]) -> tuple[str, ...]:
    """Return the files of optimizer and schedule that a complete checkpoint must have."""
    # If one of these files is missing, the Trainer silently begins with a new optimizer or schedule.
    if any(name.endswith("_states.pt") for name in listed):  # DeepSpeed's files, which can also contain the schedule
        return ("latest",)
    if "optimizer_0/.metadata" in listed:  # FSDP's shards
        return (SCHEDULER,)
    return (OPTIMIZER, SCHEDULER)


def _named_after_steps(folder: Path) -> list[Path]:
    """Return the folders, or links to folders, in `folder` that have a checkpoint's name."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.is_dir() and _FOLDER.fullmatch(path.name)]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _sha256(path: Path) -> str:
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
