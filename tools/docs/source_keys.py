"""Fields of dataclasses and keys of dict literals, with the comments beside them."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SourceKey:
    """A key of a JSON file: its name, its type in Python where the source gives it, and the comment."""

    name: str
    type: str
    comment: str


def keys_of(file: Path, name: str) -> list[SourceKey]:
    """Return the fields of a class, or the keys of the dict that a function builds.

    `name` is the class, the function or Class.method. Of a function the outermost dict literal counts.
    """
    source = file.read_text(encoding="utf-8")
    found: ast.AST = ast.parse(source)
    for part in name.split("."):
        found = next(node for node in ast.walk(found) if getattr(node, "name", None) == part)
    assert isinstance(found, ast.ClassDef | ast.FunctionDef)
    comments = _comments(source)
    keys = list(_fields(found) if isinstance(found, ast.ClassDef) else _dict_keys(found))
    return [SourceKey(key, kind, _comment(comments, line)) for key, kind, line in keys]


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, int]]:
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            yield each.target.id.rstrip("_"), ast.unparse(each.annotation), each.lineno


def _dict_keys(node: ast.FunctionDef) -> Iterator[tuple[str, str, int]]:
    whole = max((each for each in ast.walk(node) if isinstance(each, ast.Dict)), key=lambda each: len(each.keys))
    for key, value in zip(whole.keys, whole.values, strict=True):
        if isinstance(key, ast.Constant):
            yield str(key.value), "", key.lineno
        elif isinstance(value, ast.IfExp) and isinstance(value.body, ast.Dict):  # **({"jobs": jobs} if jobs else {})
            yield from ((str(ast.literal_eval(one)), "", one.lineno) for one in value.body.keys if one)


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Return {line: (comment, True if nothing else is on the line)}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token for token in tokens if token.type == tokenize.COMMENT]
    return {
        each.start[0]: (each.string.lstrip("# "), not each.line[: each.start[1]].strip())
        for each in found
        if "noqa" not in each.string
    }


def _comment(comments: dict[int, tuple[str, bool]], line: int) -> str:
    """Return the comment beside a line, or else those alone on the lines above it."""
    if line in comments:
        return comments[line][0]
    above: list[str] = []
    while (line := line - 1) in comments and comments[line][1]:
        above.insert(0, comments[line][0])
    return " ".join(above)
