"""Rows of a run that a later command names, reads otherwise or streams, and that were edited or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplus_hydra import run
from loraplus_hydra.data import fingerprint
from tests.conftest import Finished
from tests.support.edits import edit_held_out_rows, edit_rows, write_rows

Cli = Callable[..., Finished]
ALLOW = "allow_changed_inputs=true"


@pytest.fixture
def run_of_a_command(copy: Path, cli: Cli) -> Path:
    """The folder of `copy`, where commands start, with the finished run `mine` of a command with relative paths."""
    overrides = ["model=hub", "model.path=model", "data=jsonl", "data.train=rows.jsonl", "data.eval=held_out.jsonl"]
    overrides += ["trainer.max_steps=2", "trainer.save_steps=1", "task.samples=0", "trainer.eval_strategy=no"]
    ended = cli(*overrides, "trainer.per_device_train_batch_size=4", "hydra.run.dir=mine")
    assert ended.status == 0, ended.err
    return copy


def test_rows_named_on_the_command_line_are_new_rows(copy: Path, cli: Cli) -> None:
    write_rows(copy / "others.jsonl", "others")
    assert cli("evaluate", "done", f"data.eval={copy / 'others.jsonl'}").status == 0
    edit_rows(copy)
    resumed = cli("resume", "stopped", f"data.train={copy / 'rows.jsonl'}", "trainer.max_steps=3")
    assert resumed.status == 0, resumed.err
    # The rows that were named then are the run's rows now.
    again = cli("resume", "stopped", "trainer.max_steps=4")
    assert again.status == 0, again.err


@pytest.mark.parametrize(
    ("changes", "key", "rows"),
    [
        (["data.train=new.jsonl"], "train", "new.jsonl"),
        (["data.train=[new.jsonl,rows.jsonl]"], "train", ["new.jsonl", "rows.jsonl"]),
        (["data.eval=new.jsonl"], "eval", "new.jsonl"),
        (["data.eval='${data.train}'"], "eval", "rows.jsonl"),
        (["data.train=new.jsonl", "data.eval='${data.train}'"], "eval", "new.jsonl"),
    ],
)
def test_rows_of_an_earlier_resume_stay_the_runs_rows(
    changes: list[str], key: str, rows: Any, run_of_a_command: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_of_the_run() -> Any:
        return yaml.safe_load((folder / "mine" / "config.yaml").read_text())["data"][key]

    folder = run_of_a_command
    names = rows if isinstance(rows, list) else [rows]
    expected = [str(folder / name) for name in names] if isinstance(rows, list) else str(folder / rows)
    write_rows(folder / "new.jsonl", "new")
    assert cli("resume", "mine", *changes, "trainer.max_steps=3").status == 0
    assert rows_of_the_run() == expected
    again = cli("resume", "mine", "trainer.max_steps=4")
    assert again.status == 0, again.err
    assert "data.train:" not in again.out
    assert "data.eval:" not in again.out
    assert rows_of_the_run() == expected
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    from_elsewhere = cli("resume", "../mine", "trainer.max_steps=5")
    assert from_elsewhere.status == 0, from_elsewhere.err
    assert rows_of_the_run() == expected


@pytest.mark.parametrize(
    ("edit", "command", "refused"),
    [
        (edit_held_out_rows, ("resume", "stopped", "data.train=rows.jsonl"), "data.eval"),
        (edit_rows, ("resume", "stopped", "data.eval=held_out.jsonl"), "data.train"),
        (edit_rows, ("resume", "stopped", "data.eval_fraction=0.2"), "data.train"),  # no rows are held out
        (edit_rows, ("resume", "stopped", "data.messages_column=null"), "data.train"),
        (edit_rows, ("resume", "stopped", "data.max_samples=null"), "data.train"),  # the value that it has
        (edit_rows, ("resume", "stopped", "data.max_samples=20"), ""),
        (edit_held_out_rows, ("resume", "stopped", "data.encoding=latin-1"), ""),
        (edit_held_out_rows, ("evaluate", "done", "data.messages_column=null"), "data.eval"),
        (edit_held_out_rows, ("evaluate", "done", "data.train=rows.jsonl"), "data.eval"),
        (edit_held_out_rows, ("evaluate", "done", "data.max_samples=20"), ""),
        (edit_held_out_rows, ("evaluate", "done", "data.eval=held_out.jsonl"), ""),
    ],
)
def test_only_rows_that_the_command_names_or_reads_otherwise_are_not_compared(
    edit: Callable[[Path], None], command: tuple[str, ...], refused: str, copy: Path, cli: Cli
) -> None:
    edit(copy)
    ended = cli(*command)
    assert ended.status == bool(refused), ended.err
    assert f"{refused}: the content of the" in ended.err if refused else not ended.err, ended.err


@pytest.mark.parametrize(
    "changes", [["data.eval=held_out.jsonl"], ["data.eval_fraction=0.2"], ["data.train=new.jsonl"]]
)
def test_rows_that_are_split_change_together(changes: list[str], copy: Path, cli: Cli) -> None:
    write_rows(copy / "new.jsonl", "new")
    overrides = ["model=hub", "model.path=model", "data=jsonl", "data.train=rows.jsonl", "trainer.max_steps=1"]
    overrides += ["trainer.save_steps=1", "task.samples=0", "trainer.eval_strategy=no", "hydra.run.dir=split"]
    assert cli(*overrides).status == 0
    ended = cli("resume", "split", *changes, "trainer.max_steps=2")
    assert ended.status == 0, ended.err
    edit_rows(copy)
    edited = cli("resume", "split", "trainer.max_steps=3", "data.messages_column=null")
    assert edited.status == ("data.train=new.jsonl" not in changes), edited.out


def test_automatic_resume_takes_new_rows_from_the_command_line(copy: Path, cli: Cli) -> None:
    overrides = [
        *("model=hub", f"model.path={copy / 'model'}", "data=jsonl", f"data.train={copy / 'rows.jsonl'}"),
        *(f"data.eval={copy / 'held_out.jsonl'}", "trainer.max_steps=4", "trainer.save_steps=2", "task.samples=0"),
        *("trainer.eval_strategy=no", "hydra.run.dir=mine"),
    ]
    assert cli(*overrides).status == 0
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(f"mine/{name}")
    Path("mine/result.json").unlink()
    write_rows(copy / "new.jsonl", "new")
    overrides[3] = f"data.train={copy / 'new.jsonl'}"
    finished = cli(*overrides, "trainer.resume_from_checkpoint=auto")
    assert finished.status == 0, finished.err
    assert json.loads(Path("mine/result.json").read_text())["resumed_at"] == [2]


def test_images_of_a_stream_are_not_known_by_their_address() -> None:
    read = [fingerprint.RowsRead(), fingerprint.RowsRead()]
    images = [object(), object()]  # both exist, so their addresses differ
    for each, image in zip(read, images, strict=True):
        each.see({"image": image, "text": "say"}, 0)
    assert read[0].digest == read[1].digest


@pytest.mark.parametrize("first", [0, 1000])
def test_first_rows_of_a_stream_are_compared_and_the_rows_that_were_read(
    tiny_run: list[str], tmp_path: Path, compose: Any, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(fingerprint, "_FIRST", first)
    rows, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    write_rows(rows, "say")
    write_rows(held_out, "say")
    overrides = [
        *tiny_run,
        *(f"data.train={rows}", f"data.eval={held_out}", "data.streaming=true", "trainer.eval_strategy=no"),
        *("trainer.save_steps=2", "task.samples=0", "trainer.per_device_train_batch_size=2"),
    ]
    run(compose(*overrides), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    rows.write_text(rows.read_text().replace('"say 7"', '"say 77"'))
    resumed = [*overrides, "trainer.resume_from_checkpoint=auto"]
    expected = "content of the training rows has changed" if first else r"first \d+ rows of the stream differ"
    with pytest.raises(Exception, match=f"data.train: the {expected}"):
        run(compose(*resumed), tmp_path / "run")
    run(compose(*resumed, ALLOW), tmp_path / "run")
