"""The standard library's source code: its modules, the held-out ones, and text without docstrings.

This module needs only the standard library. Files are parsed, never imported.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import io
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplus_hydra.errors import UserError

EVAL_FRACTION = 0.1  # share of the modules that are held out, also from the pretraining of the built-in model

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}  # installed packages are in folders with a hyphen
_SKIPPED_PACKAGES = {"encodings", "pydoc_data"}  # character tables, and the text of Python's manual in one string
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ from machine to machine

# With this salt a tenth of the pairs is held out in each of CPython 3.10 to 3.13, and no single module has a large part
# of them. The built-in weights were trained with Python 3.11. No version's held-out prompt is a training prompt of
# 3.11.
_SALT = "loraplus_hydra/370"


def library_modules(folder: Path | None = None) -> dict[str, Path]:
    """Return {dotted name: source file} of the standard library, sorted.

    `folder` is the library's folder (default: the running Python's). Tests, installed packages, character tables, the
    manual's text, and files that differ between machines are omitted. Raises UserError if there is no source, because
    some Pythons have a zipped library or no source.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    modules = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name.isidentifier() and name not in _SKIPPED_FOLDERS]
        for file in files:
            stem = file.removesuffix(".py")
            if stem == file or not stem.isidentifier() or stem.startswith(_SKIPPED_FILES):
                continue
            path = Path(place, file)
            parts = (*path.parent.relative_to(folder).parts, *([] if stem == "__init__" else [stem]))
            if parts and parts[0] not in _SKIPPED_PACKAGES:
                modules[".".join(parts)] = path
    if not modules:
        raise UserError(
            f"data=embedded: there is no standard library source in {folder} (this Python seems to have a zipped "
            "library, or none); use another Python, or your own text: data=jsonl data.train=FILE"
        )
    return dict(sorted(modules.items()))


@contextmanager
def no_collections() -> Iterator[None]:
    """Pause garbage collection inside the block.

    Collections take longer than parsing, and syntax trees have no garbage.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_library(folder: Path | None = None) -> Iterator[tuple[str, Source]]:
    """Yield (dotted name, Source) of each module that can be parsed, sorted by name."""
    for name, path in library_modules(folder).items():
        try:
            raw = path.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            source = Source(io.TextIOWrapper(io.BytesIO(raw), encoding).read())
        except (OSError, SyntaxError, ValueError):  # ValueError: bytes wrong for the encoding, or null bytes
            continue
        yield name, source


def is_held_out(module: str, fraction: float = EVAL_FRACTION) -> bool:
    """Return True if the module with this dotted name is held out.

    A hash of the name decides, so the answer is the same in every Python version. A larger fraction holds out more
    modules, including all modules of a smaller fraction.
    """
    # `_pydatetime` was called `datetime` before a faster module got that name. The same holds for other `_py` modules.
    return stable_hash(_SALT + module.removeprefix("_py")) < fraction * 2**64


def stable_hash(text: str) -> int:
    """Return a number below 2**64. Unlike `hash`, it is equal in every process and Python version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the blocks of statements directly inside a module or a statement."""
    # Much faster than `ast.walk`.
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if block:
            yield block
    for name in ("handlers", "cases"):  # parts of try and match
        for part in getattr(node, name, ()):
            yield part.body


@dataclass(frozen=True)
class _Cut:
    begin: int
    end: int
    replacement: bytes


class Source:
    """A parsed module, and the replacement of each of its bare strings.

    Raises SyntaxError, or ValueError for null bytes.
    """

    def __init__(self, text: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library has outdated escapes such as "\d"
            self.tree = ast.parse(text)
        # Offsets are in bytes of UTF-8, as in ast. splitlines() would also end a line at a form feed, but ast doesn't.
        self._text = text.encode()
        self._lines = [0, *(newline.end() for newline in re.finditer(b"\n", self._text))]
        self._cuts: list[_Cut] = []
        self._find_cuts(self.tree)
        self._cuts.sort(key=lambda cut: cut.begin)

    def line_of(self, node: ast.stmt) -> int:
        """Return the offset of the line where the statement, or its first decorator, begins."""
        decorators: list[ast.expr] = getattr(node, "decorator_list", [])
        return self._lines[min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1]

    def begin(self, node: ast.stmt) -> int:
        """Return the offset of the statement's first character, after its indentation."""
        return self.line_of(node) + node.col_offset

    def end(self, node: ast.stmt) -> int:
        """Return the offset after the statement's last character."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def without_docstrings(self, begin: int = 0, end: int | None = None) -> str:
        """Return the text from offset `begin` to `end` without docstrings and other bare strings.

        The result is valid Python.
        """
        end = len(self._text) if end is None else end
        pieces = []
        for cut in self._cuts:
            if begin <= cut.begin and cut.end <= end:
                pieces += [self._text[begin : cut.begin], cut.replacement]
                begin = cut.end
        return b"".join([*pieces, self._text[begin:end]]).decode()

    def _find_cuts(self, node: ast.AST) -> None:
        for block in blocks(node):
            self._cuts += self._string_cuts(block, may_be_empty=isinstance(node, ast.Module))
            for statement in block:
                self._find_cuts(statement)

    def _string_cuts(self, statements: list[ast.stmt], *, may_be_empty: bool) -> Iterator[_Cut]:
        strings = [statement for statement in statements if _is_bare_string(statement)]
        needed = strings[:1] if len(strings) == len(statements) and not may_be_empty else []
        for statement in strings:
            begin, end = self.begin(statement), self.end(statement)
            line, next_line = self.line_of(statement), self._text.find(b"\n", end) + 1 or len(self._text)
            alone = not self._text[line:begin].strip() and not self._text[end:next_line].strip()
            if alone and statement not in needed:
                blank_lines = re.compile(rb"(?:[ \t\f]*\n)*").match(self._text, next_line)
                yield _Cut(line, blank_lines.end() if blank_lines else next_line, b"")
            else:  # there is other code on the line, or the block needs a statement
                yield _Cut(begin, end, b"pass")


def _is_bare_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
