"""docs/promises.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_promise_names_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "Tests" not in line]
    assert len(rows) > 20
    for row in rows:
        assert re.findall(r"`test_\w+\.py`", row), row
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    for file in re.findall(r"`(test_\w+\.py)`", text):
        assert file in sources
    everything = "\n".join(sources.values())
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in everything, name
