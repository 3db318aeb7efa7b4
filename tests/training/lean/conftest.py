"""What the tests of the lean forward share: rows of very different lengths, and the reports on the forward pass."""

from __future__ import annotations

import json

import pytest

from loraplus_hydra.io import screen


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that report the forward pass."""
    lines: list[str] = []
    own = screen.show

    def show(text: str) -> None:
        own(text)
        if "Forward pass" in text:
            lines.append(text)

    monkeypatch.setattr(screen, "show", show)
    return lines


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that train on 60 rows of very different lengths."""
    path = tmp_path_factory.mktemp("uneven") / "rows.jsonl"
    words = ("one", "two", "three", "four")
    rows = [
        {"prompt": " ".join(["say", *(words[(i * k) % 4] for k in range(i % 13))]), "completion": " " + words[i % 4]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"data.train={path}", "optimizer.lr=2e-4", "task.samples=0", "trainer.use_cpu=true"]
