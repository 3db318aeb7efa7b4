"""Local paths that config.yaml has as absolute paths, in each form of data.train."""

from __future__ import annotations

import json
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.config.stored_paths import absolute, is_absolute_of, is_here
from tests.conftest import Finished


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with brackets in its name, and the files rows.jsonl, sub/a.jsonl and sub/b.jsonl."""
    folder = tmp_path / "with [brackets]"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("rows", "sub/a", "sub/b")):
        rows = [{"prompt": f"say {number} {i}", "completion": f" {i}"} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    return folder


def test_pattern_is_absolute_and_matches_the_same_files_from_elsewhere(here: Path, tmp_path: Path) -> None:
    for pattern, names in (("sub/*.jsonl", "ab"), ("**/a.jsonl", "a"), ("sub/[b].jsonl", "b")):
        stored = absolute(pattern)
        assert sorted(glob(stored, recursive=True)) == [str(here / "sub" / f"{name}.jsonl") for name in names]
        assert absolute(stored) == stored
        assert is_absolute_of(stored, pattern)


def test_paths_of_lists_and_mappings_are_absolute(here: Path) -> None:
    assert absolute(["rows.jsonl", "none.jsonl"]) == [str(here / "rows.jsonl"), "none.jsonl"]
    weights = {"sub/a.jsonl": 2, "rows.jsonl": 1}
    stored = {str(here / "sub" / "a.jsonl"): 2, str(here / "rows.jsonl"): 1}
    assert absolute(weights) == stored
    assert is_absolute_of(stored, weights)
    assert not is_absolute_of(stored, weights | {"rows.jsonl": 3})
    assert is_here(weights)
    assert not is_here([*weights, "none.jsonl"])
    assert [absolute(other) for other in ("org/name", "[", "no/*.jsonl", "", None, 3)] == [
        *("org/name", "[", "no/*.jsonl", "", None, 3),
    ]


@pytest.mark.parametrize("train", ["sub/*.jsonl", "[sub/a.jsonl,rows.jsonl]", "{sub/a.jsonl: 2, rows.jsonl: 1}"])
def test_run_is_evaluated_and_resumed_from_another_folder(
    train: str, cli: Callable[..., Finished], tiny_run: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    settings = ["trainer.max_steps=2", "trainer.eval_strategy=no", "task.samples=0", "hydra.run.dir=run"]
    trained = cli(*tiny_run, f"data.train={train}", *settings)
    assert trained.status == 0, trained.err
    monkeypatch.chdir(here.parent)
    commands: list[Any] = [("evaluate", str(here / "run")), ("resume", str(here / "run"), "trainer.max_steps=3")]
    for command in commands:
        ended = cli(*command)
        assert ended.status == 0, ended.err
        assert "data.train" not in ended.out
