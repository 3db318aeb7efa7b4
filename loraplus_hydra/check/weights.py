"""Checks of model and checkpoint folders, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open

from loraplus_hydra.config.locations import expanded, model_location
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line
from loraplus_hydra.io.checkpoints import AUTO, KEY, Checkpoint, open_checkpoint
from loraplus_hydra.io.files import found_at

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_KEY = "model.path"
_WHY = "only safetensors are read, because a pickle can run code: convert the weights"


def location_problems(model: dict[str, Any]) -> list[Problem]:
    """Return Problems for locations of model and tokenizer that can't be valid."""
    problems = []
    for name in ("path", "tokenizer"):
        value = model.get(name)
        if not isinstance(value, str):
            continue
        try:
            if not value.strip() or "\0" in value:
                raise UserError(f"{value!r} is not a name")
            folder = Path(model_location(value))
            if folder.is_dir() and (special := _special_file(folder)):
                raise UserError(f"{special} is neither a file nor a folder")  # libraries would wait for ever for a FIFO
        except (UserError, OSError) as error:
            what = str(error) if isinstance(error, UserError) else f"{value[:100]}: {error.strerror}"
            problems.append(Problem(f"model.{name}", what, "give a folder, or a model on a hub"))
    return problems


def weights_problems(model: DictConfig) -> list[Problem]:
    """Return the errors of the weights in a model's folder. A hub's model is not checked."""
    folder = Path(model_location(model.path))
    if not folder.is_dir():
        return []
    if (folder / "adapter_config.json").is_file():
        # transformers would load the base that the adapter's config names, from any place.
        fix = "set model.path to the base model, and adapter.path to the adapter"
        return [Problem(_KEY, f"{folder} is an adapter's folder, not a model's", fix)]
    if not (folder / "config.json").is_file():  # reported by the check of the model's config
        return []
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
        problems: list[Problem] = []
    elif (folder / INDEX).is_file():
        files, problems = _listed(folder)
    else:
        return [Problem(_KEY, f"there is no {WEIGHTS} in {folder}", _WHY)]
    return problems or [problem for file in files for problem in _header_problems(file)]


def open_named_checkpoint(config: DictConfig) -> Checkpoint | None:
    """Return the checkpoint that the config names, or None.

    Raises ConfigErrors if the checkpoint is incomplete.
    """
    named = config.trainer.get("resume_from_checkpoint")
    if named is None or named == AUTO:
        return None
    found_at(expanded(str(named)), KEY)
    try:
        return open_checkpoint(expanded(str(named)))
    except ValueError as error:
        fix = f"use a complete checkpoint (RUN/checkpoints/checkpoint-N), or {AUTO} for the newest one of this run"
        raise ConfigErrors([Problem(KEY, f"{named} is not a complete checkpoint: {error}", fix)]) from error


def _special_file(folder: Path) -> Path | None:
    """Return a FIFO, device or socket in `folder`, or None.

    Links are followed, because the folder is the user's own.
    """
    return next((path for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())), None)


def _listed(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Return the files in a sharded model's index, and the index's errors.

    Files outside the folder are errors.
    """
    index = folder / INDEX
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [], [Problem(_KEY, f"{index} can't be read: {first_line(error)}", "download the model again")]
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name or "\\" in name]
    pickled = [name for name in names if name not in outside and not name.endswith(".safetensors")]
    problems = [Problem(_KEY, f"{index} lists '{name}', which is not a file of the folder") for name in outside]
    problems += [Problem(_KEY, f"{index} lists '{name}'", _WHY) for name in pickled]
    return [folder / name for name in names if name not in outside], problems


def _header_problems(file: Path) -> list[Problem]:
    try:
        with safe_open(file, framework="pt"):
            return []
    except (SafetensorError, OSError) as error:
        return [Problem(_KEY, f"{file} can't be read as safetensors: {first_line(error)}", _WHY)]
