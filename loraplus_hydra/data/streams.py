"""Text files, possibly compressed, possibly with a byte order mark."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from loraplus_hydra.errors import UserError, first_line

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # suffixes of compressed files; they follow the format's suffix
_START = 512  # bytes at a file's start that identify compression, archive and encoding


def _arrow(codec: str) -> Callable[[str], Any]:
    # Buffered, because Arrow's own stream can't be read line by line.
    return lambda path: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), codec))


_DECOMPRESS: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _arrow("zstd"),
    b"\x04\x22\x4d\x18": _arrow("lz4"),
}
# Longer marks come first, because the mark of UTF-32 begins with the mark of UTF-16.
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
# Encodings without a mark. The null bytes among the first four identify them if the file begins with two ASCII
# characters.
_WIDE = {
    b"\0\1\0\1": "utf-16-le",
    b"\1\0\1\0": "utf-16-be",
    b"\0\1\1\1": "utf-32-le",
    b"\1\1\1\0": "utf-32-be",
}


def find_encoding(path: str, encoding: str) -> str:
    """Return the encoding that a file's first bytes show, or `encoding` if they show none.

    Raises UserError for archives and files that can't be read.
    """
    start = _read_start(path)
    marked = (name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark))
    nulls = bytes(byte == 0 for byte in start[:4])
    return next(marked, _WIDE.get(nulls, encoding))


def open_text(path: str, encoding: str, newline: str | None = None) -> IO[str]:
    """Open a file's text, unpacked if it is compressed by gzip, bzip2, xz, zstd or lz4."""
    return io.TextIOWrapper(_opened(path), encoding=encoding, newline=newline)


def bad_line(path: str, encoding: str) -> str:
    """Return `, line 3` for the first line that isn't valid `encoding` text; empty if unknown."""
    # In these encodings a line break is not one byte.
    if encoding.lower().startswith(("utf-16", "utf-32")):
        return ""
    with _opened(path) as file:
        bad = (number for number, line in enumerate(file, start=1) if not _decodes(line, encoding))
        number = next(bad, None)
    return "" if number is None else f", line {number}"


def unreadable(path: str, error: Exception) -> UserError:
    """Return the error about a file that the system or a decompressor can't read."""
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"{path}: {error.strerror}")
    return UserError(f"{path}: can't be unpacked; the file is incomplete or damaged: {first_line(error)}")


# Errors that the decompressors raise in addition to OSError.
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def _opened(path: str) -> Any:
    """Return the file's bytes as a buffered stream, unpacked."""
    file = Path(path).open("rb")  # noqa: SIM115
    start = file.peek(_START)
    unpack = next((unpack for mark, unpack in _DECOMPRESS.items() if start.startswith(mark)), None)
    if unpack is None:
        return file
    file.close()
    return unpack(path)


def _read_start(path: str) -> bytes:
    try:
        with _opened(path) as file:
            start: bytes = file.read(_START)
    except DAMAGED as error:
        raise unreadable(path, error) from None
    if start.startswith(b"PK\x03\x04") or start[257:262] == b"ustar":
        raise UserError(f"{path}: it is an archive (zip or tar); unpack it, and give the paths of its files")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: this is a Git LFS pointer, not the file; run git lfs pull")
    return start


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True
