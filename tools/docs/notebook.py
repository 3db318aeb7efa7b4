"""The demo notebook, executed and stored with its outputs: python -m tools.docs.notebook."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "howto" / "notebook.ipynb"
SECONDS = 600  # of a cell, on a slow machine


def executed(folder: Path) -> nbformat.NotebookNode:
    """Return the notebook with new outputs; the run's files go into `folder`.

    Warnings on stderr are left out, because they are those of one machine.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        nbformat.write(executed(Path(made)), NOTEBOOK)
