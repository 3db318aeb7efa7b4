"""What is loaded from folders, before it is: a model's weights, by names and headers alone, and a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.config.locations import model_location
from loraplus_hydra.errors import Problem, UserError, first_line
from loraplus_hydra.io import checkpoints

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_KEY = "model.path"
_WHY = "only safetensors are read, since a pickle can run code: convert the weights"


def location_problems(model: dict[str, Any]) -> list[Problem]:
    """Names of the model and its tokenizer that can be none of a folder or a model, in a plain `model` group."""
    problems = []
    for name in ("path", "tokenizer"):
        value = model.get(name)
        if not isinstance(value, str):
            continue
        try:
            if not value.strip() or "\0" in value:
                raise UserError(f"{value!r} is no name")
            folder = Path(model_location(value))
            if folder.is_dir() and (special := _special_file(folder)):
                raise UserError(f"{special} is neither a file nor a folder")  # a library would wait for a FIFO
        except (UserError, OSError) as error:
            what = str(error) if isinstance(error, UserError) else f"{value[:100]}: {error.strerror}"
            problems.append(Problem(f"model.{name}", what, "name a folder, or a model on a hub"))
    return problems


def weights_problems(model: DictConfig) -> list[Problem]:
    """What keeps the weights of a model's folder from being loaded; of a model on a hub nothing is known here."""
    folder = Path(model_location(model.path))
    if not folder.is_dir():
        return []
    if (folder / "adapter_config.json").is_file():
        # transformers would load the base that the adapter names instead, from wherever that is.
        fix = "name the base model here, and the adapter by adapter.path"
        return [Problem(_KEY, f"{folder} is an adapter's folder, not a model's", fix)]
    if not (folder / "config.json").is_file():  # no model's folder at all, which is told of its config
        return []
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
        problems: list[Problem] = []
    elif (folder / INDEX).is_file():
        files, problems = _listed(folder)
    else:
        return [Problem(_KEY, f"there is no {WEIGHTS} in {folder}", _WHY)]
    return problems or [problem for file in files for problem in _header_problems(file)]


def checkpoint_problems(config: DictConfig) -> list[Problem]:
    """What is wrong with a checkpoint that the config names."""
    named = config.trainer.get("resume_from_checkpoint")
    if named is None or named == checkpoints.AUTO:
        return []
    try:
        checkpoints.open_checkpoint(Path(str(named)).expanduser())
    except ValueError as error:
        fix = f"name a whole one (RUN/checkpoints/checkpoint-N), or {checkpoints.AUTO} for the newest of the run's own"
        return [Problem(checkpoints.KEY, f"{named} doesn't count: {error}", fix)]
    return []


def _special_file(folder: Path) -> Path | None:
    """Return a FIFO, device or socket in `folder`, or None. Links are followed: the folder is the user's own."""
    return next((path for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())), None)


def _listed(folder: Path) -> tuple[list[Path], list[Problem]]:
    """The files that the index of a model in parts names: files of this folder alone."""
    index = folder / INDEX
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [], [Problem(_KEY, f"{index} can't be read: {first_line(error)}", "fetch the model again")]
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name or "\\" in name]
    pickled = [name for name in names if name not in outside and not name.endswith(".safetensors")]
    problems = [Problem(_KEY, f"{index} names '{name}', which is no file of the folder") for name in outside]
    problems += [Problem(_KEY, f"{index} names '{name}'", _WHY) for name in pickled]
    return [folder / name for name in names if name not in outside], problems


def _header_problems(file: Path) -> list[Problem]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return []
    except (SafetensorError, OSError) as error:
        return [Problem(_KEY, f"{file} can't be read as safetensors: {first_line(error)}", _WHY)]
