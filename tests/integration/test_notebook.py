"""The demo notebook runs, and its stored outputs are those that a reader gets."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tools.docs.notebook import NOTEBOOK, executed


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    """Text of each output, in order, and the types of other outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs if output.output_type != "stream"]
    return ["".join(str(output.get("text", "")) for output in outputs), *(kind for each in data for kind in each)]


def test_stored_notebook_has_rates_live_lines_and_picture() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text, *kinds = shown(notebook)
    assert "step 40 of 40: loss" in text
    assert "tokens/s" in text
    assert "image/png" in kinds
    tables = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "What gets which rate" in str(output)
    ]
    assert len(tables) == 1
    assert "/home/" not in str(notebook)
    assert "/tmp/" not in str(notebook)


@pytest.mark.slow
def test_notebook_runs_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    before, after = nbformat.read(NOTEBOOK, as_version=4), executed(tmp_path)
    codes = [(old, new) for old, new in zip(before.cells, after.cells, strict=True) if old.cell_type == "code"]
    status, first, last = eval(codes[2][1].outputs[0]["data"]["text/plain"])
    assert status == "ok"
    assert last < first
    assert (
        codes[3][1].outputs[0]["data"]["text/plain"]
        == codes[3][0].outputs[0]["data"]["text/plain"]
        == ("{'lora_A': 0.0005, 'lora_B': 0.008}")
    )
    assert [output.output_type for output in codes[4][1].outputs] == ["execute_result"]  # the picture
