"""Loads that run no code from a checkpoint, also from one that DeepSpeed or FSDP wrote.

The Trainer reads its own files with `weights_only=True`. But DeepSpeed reads its states without it, and torch unpickles
the metadata of FSDP's shards: both would run whatever code somebody put into the file.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.files import open_regular

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_OTHERS = {
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),  # where the shards were written
    ("pathlib._local", "PosixPath"),  # the same in Python 3.13
}
_METADATA = ".metadata"  # torch's name for the file that lists the tensors in a folder of shards


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Make each `torch.load` inside the block accept tensors and plain values only.

    It does so whatever the caller asks for. Raises UserError for a file with anything else.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_of_deepspeed()):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(
            "the checkpoint contains more than tensors and plain values, so loading it could run code; "
            "name an earlier checkpoint, or run anew"
        ) from error
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refuse_code(checkpoint: Path) -> None:
    """Raise UserError if the metadata of FSDP's shards contain anything but descriptions of tensors."""
    for path in checkpoint.rglob(_METADATA):
        try:
            with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
                _Descriptions(file).load()
        except Exception as error:  # a broken pickle raises almost any class
            what = f"{path} isn't only a description of tensors ({error}), so loading it could run code"
            raise UserError(what) from error


class _Descriptions(pickle.Unpickler):
    """An unpickler that knows only the classes with which torch describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if (module, name) in _OTHERS else None
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        elif module == metadata.__name__ and inspect.isclass(getattr(metadata, name, None)):
            found = getattr(metadata, name)
            found = found if found.__module__ == module else None  # not a class that the module only imports
        if found is None:
            raise UserError(f"it names {module}.{name}")
        return found


def _of_deepspeed() -> list[Any]:
    """Return the classes that DeepSpeed's states contain. They hold numbers and flags."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
