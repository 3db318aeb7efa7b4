"""JSON arrays hold the same rows as lines of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.data.files import load
from loraplus_hydra.errors import ConfigErrors

ROWS = [{"prompt": f"say {number}", "completion": [number, None]} for number in range(3)]


def loaded(path: Path) -> list[dict[str, Any]]:
    rows = load(str(path), str(path))["train"]
    return [{name: row[name] for name in ("prompt", "completion")} for row in rows]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(ROWS, indent=indent), encoding="utf-8")
    assert loaded(path) == ROWS


def test_errors_in_an_array_name_the_line_or_the_item(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"a": 1},\n{"a": }\n]', encoding="utf-8")
    with pytest.raises(ConfigErrors, match="line 3: not JSON"):
        load(str(path), str(path))
    path.write_text('[{"a": 1}, 2]', encoding="utf-8")
    with pytest.raises(ConfigErrors, match="item 2: a int"):
        load(str(path), str(path))
