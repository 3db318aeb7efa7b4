"""Edits of the rows of a run: `rows.jsonl` and `held_out.jsonl` in a folder."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(file: Path, text: str) -> None:
    file.write_text("".join(json.dumps({"prompt": f"{text} {i}", "completion": f" {i}"}) + "\n" for i in range(24)))


def edit_rows(folder: Path) -> None:
    file = folder / "rows.jsonl"
    file.write_text(file.read_text().replace("rows 7", "rows 8"))


def edit_held_out_rows(folder: Path) -> None:
    write_rows(folder / "held_out.jsonl", "others")
