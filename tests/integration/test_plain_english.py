"""Texts are plain: docstrings open with no question and a short line, and no text has a phrase that puzzles readers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("loraplus_hydra", "conf", "benchmarks", "tools")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
QUESTIONS = ("What", "Where", "How", "Which", "Whether")
# Phrases that readers had to read twice, in code, comments, messages, YAML files and pages.
PUZZLING = re.compile(
    r"\b(of which|as such|so as to|and the like|its like|those which|our own|what of|go(es)? on|somebody else)\b"
    r"|, of them\b|\bbehind it\b"
)


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


def test_no_text_has_a_puzzling_phrase() -> None:
    files = [file for folder in FOLDERS for kind in ("py", "yaml") for file in (ROOT / folder).rglob(f"*.{kind}")]
    files += [file for page in PAGES for file in ROOT.glob(page)]
    found = {
        f"{file.relative_to(ROOT)}:{number}": match[0]
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if (match := PUZZLING.search(line))
    }
    assert found == {}
