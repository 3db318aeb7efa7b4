"""Docstrings open plainly: none asks a question in its first word, and first lines are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("loraplus_hydra", "conf", "benchmarks", "tools")
QUESTIONS = ("What", "Where", "How", "Which", "Whether")


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each docstring in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{file.relative_to(ROOT)}:{getattr(node, 'name', 'module')}", text


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_open_plainly(folder: str) -> None:
    found = [one for file in sorted((ROOT / folder).rglob("*.py")) for one in docstrings(file)]
    assert found
    assert [place for place, text in found if text.split()[0] in QUESTIONS] == []
    assert [place for place, text in found if len(text.splitlines()[0]) > 100] == []
