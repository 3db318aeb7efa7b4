"""Rows that can't be read, and folders that can't be used, are told with their key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished


def test_broken_json_is_told_with_its_line(tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n{not json}\n", encoding="utf-8")
    finished = cli(*tiny_run, f"data.train={broken}")
    assert finished.status == 1
    assert "line 2" in finished.err
    assert "data.train" in finished.err


def test_empty_file_is_told(tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    finished = cli(*tiny_run, f"data.train={empty}")
    assert finished.status == 1
    assert "has no rows" in finished.err


def test_missing_column_is_told_with_those_that_are_there(tiny_run: list[str], cli: Callable[..., Finished]) -> None:
    finished = cli(*tiny_run, "data.prompt_column=question")
    assert finished.status == 1
    assert "data.prompt_column" in finished.err
    for column in ("'question'", "prompt", "completion"):
        assert column in finished.err


def test_used_run_folder_is_refused_and_left_alone(
    tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep me")
    finished = cli(*tiny_run, f"hydra.run.dir={folder}")
    assert finished.status == 1
    assert "isn't empty" in finished.err
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


LONG = "x" * 300  # more than the 255 bytes that file systems take


@pytest.mark.parametrize(
    ("words", "key"),
    [
        *(([command, LONG], "run") for command in ("predict text=a", "evaluate", "export", "resume")),
        (["report", LONG], "folder"),
        (["report", f"sub/{LONG}/sub"], "folder"),
        (["TINY", f"hydra.run.dir={LONG}"], "hydra.run.dir"),
        (["TINY", f"hydra.run.dir=new/{LONG}"], "hydra.run.dir"),
        (["TINY", f"hydra.run.dir={LONG}", "trainer.resume_from_checkpoint=auto"], "hydra.run.dir"),
        (["TINY", "-m", "seed=1,2", f"hydra.sweep.dir={LONG}"], "hydra.sweep.dir"),
        (["TINY", "-m", "seed=1,2", f"hydra.sweep.dir=new/{LONG}"], "hydra.sweep.dir"),
        (["TINY", f"model.path={LONG}"], "model.path"),
        (["TINY", f"model.path=./{LONG}"], "model.path"),
        (["TINY", f"model.tokenizer={LONG}"], "model.tokenizer"),
        (["TINY", f"data.train={LONG}"], "data.train"),
        (["TINY", f"trainer.resume_from_checkpoint={LONG}"], "trainer.resume_from_checkpoint"),
        (["TINY", f"task.args.chat_template_path={LONG}.jinja"], "task.args.chat_template_path"),
        (["TINY", "adapter=existing", f"adapter.path={LONG}"], "adapter.path"),
        (["TINY", f"forgetting={LONG}"], "forgetting"),
        (["--config-dir", LONG], "--config-dir"),
    ],
)
def test_name_that_no_file_system_takes_is_an_error_of_its_key(
    words: list[str], key: str, tiny_run: list[str], cli: Callable[..., Finished]
) -> None:
    first, *more = words[0].split()
    ended = cli(*tiny_run, *words[1:]) if first == "TINY" else cli(first, *words[1:], *more)
    assert ended.status == 1
    assert f"{key}: " in ended.err
    assert "HYDRA_FULL_ERROR" not in ended.err
    assert "Traceback" not in ended.err


def test_run_folder_that_is_a_file_is_refused(
    tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("keep me")
    finished = cli(*tiny_run, "hydra.run.dir=file")
    assert finished.status == 1
    assert "is a file" in finished.err
    assert (tmp_path / "file").read_text() == "keep me"
