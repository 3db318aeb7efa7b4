"""Fingerprints of a run's inputs.

The inputs are the rows, the base weights, the tokenizer, and the adapter that training began from. A run stores their
fingerprints in its checkpoints and in result.json. A fingerprint depends only on content. It stays the same if a file
is moved, renamed or copied, or if weights are stored in other shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplus_hydra.config.identity import ALLOW
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io.files import open_regular
from loraplus_hydra.io.read import parse_json

LARGEST = 2**29  # bytes; larger weights are not hashed completely, but in blocks of every tensor
BLOCK = 4096  # bytes
BLOCKS = 16  # maximum number of blocks of a tensor
_READS = 2**15  # maximum number of blocks of all tensors; reading them takes some seconds on a slow disk
_LARGEST_HEADER = 10**8  # bytes, safetensors' own limit

# Name of a fingerprint in JSON -> the config's key that sets the input, and a description of the input.
INPUTS = {
    "data.train": ("data.train", "content of the training rows"),
    "data.eval": ("data.eval", "content of the evaluation rows"),
    "weights": ("model.path", "content of the base weights"),
    "config.json": ("model.path", "config.json of the base model"),
    "tokenizer": ("model.tokenizer", "tokenizer"),
    "adapter.path": ("adapter.path", "adapter that training began from"),
    "adapter": ("run", "adapter folder of the run"),
}
NOT_STORED = "the run stored no fingerprints, so changes of its rows, weights and tokenizer are not detected"
OF_ROWS = ("data.train", "data.eval")


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a safetensors file: name, dtype, shape, and the place of its bytes."""

    file: Path
    name: str
    kind: str
    start: int
    size: int


def of_content(content: Any) -> str:
    """Return 32 hex digits that identify a JSON value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def of_files(files: Iterable[Path]) -> str:
    """Return the number of files, and 32 hex digits that identify their names and bytes."""
    listed, digest = sorted(files), hashlib.blake2b(digest_size=16)
    for file in listed:
        size = file.stat().st_size
        digest.update(of_content([file.name, size]).encode())
        for block in _blocks(file, _whole(0, size)):
            digest.update(block)
    return f"{len(listed):,} files {digest.hexdigest()}"


def of_weights(files: Iterable[Path], *, largest: int = LARGEST) -> str:
    """Return the fingerprint of the tensors in safetensors files, with their number and size.

    Up to `largest` bytes, all bytes are hashed. For larger weights, the hash covers each tensor's name, dtype, shape
    and up to BLOCKS blocks of BLOCK bytes, whose places depend on the tensor's name. Raises ValueError or OSError for a
    file that can't be read.
    """
    tensors = [tensor for file in files for tensor in _tensors(file)]
    size = sum(tensor.size for tensor in tensors)
    blocks = 0 if size <= largest else max(1, min(BLOCKS, _READS // len(tensors)))
    digest = of_content(sorted([tensor.name, tensor.kind, _tensor_digest(tensor, blocks)] for tensor in tensors))
    return f"{len(tensors):,} tensors of {size:,} bytes {digest}"


def refuse_changed(then: Mapping[str, str], now: Mapping[str, str], *, names: Iterable[str] = INPUTS) -> None:
    """Raise ConfigErrors for each of the inputs `names` whose fingerprint has changed.

    An input is skipped if `then` or `now` has no fingerprint for it.
    """
    problems = []
    for name in _changed(then, now, names):
        key, label = INPUTS[name]
        what = f"the {label} has changed since the run: it was {_short(then[name])}, and is now {_short(now[name])}"
        others = f"choose another with {key}=..., " if name in OF_ROWS else ""
        problems.append(Problem(key, what, f"restore the run's own, {others}or set {ALLOW}=true to use this one"))
    if problems:
        raise ConfigErrors(problems)


def changed_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a text for each input whose fingerprint has changed."""
    return [f"{INPUTS[name][1]}: {_short(then[name])} -> {_short(now[name])}" for name in _changed(then, now, INPUTS)]


def _changed(then: Mapping[str, str], now: Mapping[str, str], names: Iterable[str]) -> list[str]:
    return [name for name in names if then.get(name) and now.get(name) and then[name] != now[name]]


def _short(fingerprint: str) -> str:
    """Return a fingerprint with the first eight of its digits."""
    size, _, digits = fingerprint.rpartition(" ")
    return f"{size} ({digits[:8]})" if size else digits[:8]


def _tensors(file: Path) -> Iterator[_Tensor]:
    # Follows a hub cache's links, because the folder is the user's own
    handle = open_regular(file.resolve(), os.O_RDONLY)
    with os.fdopen(handle, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"{file}: its header is too large")
        header = parse_json(opened.read(length).decode("utf-8"))
        size = os.fstat(opened.fileno()).st_size
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length:
                raise ValueError(f"{file}: {name} is outside the file")
            yield _Tensor(file, name, f"{entry['dtype']} {entry['shape']}", 8 + length + first, last - first)


def _tensor_digest(tensor: _Tensor, blocks: int) -> str:
    """Return the hash of `blocks` blocks of a tensor.

    If `blocks` is 0, or the tensor is smaller, all its bytes are hashed.
    """
    if blocks and tensor.size > blocks * BLOCK:
        places = [(tensor.start + at, BLOCK) for at in _places(tensor.name, tensor.size - BLOCK, blocks)]
    else:
        places = _whole(tensor.start, tensor.size)
    digest = hashlib.blake2b(digest_size=16)
    for block in _blocks(tensor.file, places):
        digest.update(block)
    return digest.hexdigest()


def _whole(start: int, size: int) -> list[tuple[int, int]]:
    """Return the blocks, of at most one MiB, that cover `size` bytes from `start`."""
    return [(at, min(2**20, start + size - at)) for at in range(start, start + size, 2**20)]


def _places(name: str, last: int, count: int) -> list[int]:
    """Return `count` numbers from 0 to `last`, computed from a hash of the name."""
    seeds = (hashlib.blake2b(f"{name} {index}".encode(), digest_size=8).digest() for index in range(count))
    return sorted(int.from_bytes(seed, "little") % (last + 1) for seed in seeds)


def _blocks(file: Path, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes of a file at each (start, length)."""
    handle = open_regular(file.resolve(), os.O_RDONLY)
    try:
        for start, length in places:
            yield os.pread(handle, length, start)
    finally:
        os.close(handle)
