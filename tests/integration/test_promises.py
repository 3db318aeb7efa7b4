"""The table of promises in docs/explained/promises.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "explained" / "promises.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "Tests" not in line]
    assert len(rows) > 20
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for row in rows:
        files = [file for file in re.findall(r"`(?:[\w/]+/)?(test_\w+\.py)`", row) if file in sources]
        assert files, row
        for file in re.findall(r"`(?:[\w/]+/)?(test_\w+\.py)`", row):
            assert file in sources, file
        tests = "\n".join(sources[file] for file in files)
        for name in re.findall(r"`(test_\w+)`", row):
            assert f"def {name}(" in tests, name
