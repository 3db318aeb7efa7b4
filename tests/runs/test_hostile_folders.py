"""Links, FIFOs and files of another form in a run's folder are refused; nothing outside the folder changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.io.folders import remove
from tests.conftest import Finished
from tests.support.finished_runs import finished
from tests.support.hostile import canary, files_of, refused, run

__all__ = ["canary", "finished", "run"]


@pytest.fixture
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the run, in which nothing may change."""
    folder = tmp_path_factory.mktemp("victim")
    (folder / "checkpoint-1").mkdir()
    (folder / "file.txt").write_text("precious")
    return folder


def put_link(place: Path, victim: Path) -> None:
    is_folder = place.is_dir() or place.name in ("checkpoints", ".hydra")
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(victim if is_folder else victim / "file.txt")


def unchanged(victim: Path) -> bool:
    return (victim / "file.txt").read_text() == "precious" and len(files_of(victim)) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "result.json", "config.yaml", "param_groups.json", "train.png", "loraplus_hydra.log"),
        *("adapter", "checkpoints", ".hydra", ".hydra/overrides.yaml", f".adapter.{'0' * 16}.unfinished"),
    ],
)
def test_run_with_a_link_is_not_resumed(name: str, run: Path, victim: Path, cli: Callable[..., Finished]) -> None:
    put_link(run / name, victim)
    before = files_of(run)
    refused(cli("resume", str(run), "trainer.max_steps=9"), f"{name} is a link")
    assert unchanged(victim)
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "is a folder, where a run has a file") for name in ("config.yaml", "metrics.jsonl", "train.png")),
        ("loraplus_hydra.log", "is a folder, where a run has a file"),
        *((name, "is a file, where a run has a folder") for name in ("adapter", ".hydra")),
    ],
)
def test_run_with_a_folder_in_place_of_a_file_is_not_resumed(
    name: str, said: str, run: Path, cli: Callable[..., Finished]
) -> None:
    place = run / name
    remove(place)
    if said.startswith("is a folder"):
        (place / "inside").mkdir(parents=True)
    else:
        place.write_text("")
    before = files_of(run)
    refused(cli("resume", str(run), "trainer.max_steps=9"), f"{name} {said}")
    assert files_of(run) == before


def test_own_command_does_not_continue_a_run_with_a_link(
    run: Path, victim: Path, tiny_run: list[str], cli: Callable[..., Finished]
) -> None:
    (run / ".hydra").mkdir()
    put_link(run / "loraplus_hydra.log", victim)
    before = files_of(run)
    ended = cli(*tiny_run, f"hydra.run.dir={run}", "trainer.resume_from_checkpoint=auto")
    refused(ended, "hydra.run.dir", "loraplus_hydra.log is a link")
    assert files_of(run) == before
    assert unchanged(victim)


def test_folder_with_a_link_is_not_trained_into_from_python(
    victim: Path, tmp_path: Path, compose: Callable[..., Any], tiny_run: list[str]
) -> None:
    from loraplus_hydra import run as train

    put_link(tmp_path / "run" / "metrics.jsonl", victim)
    with pytest.raises(ConfigErrors, match=r"metrics.jsonl is a link"):
        train(compose(*tiny_run), tmp_path / "run")
    assert unchanged(victim)


def test_dangling_link_is_no_run_folder(tmp_path: Path, tiny_run: list[str], cli: Callable[..., Finished]) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for folder in ("link", "link/run"):
        refused(cli(*tiny_run, f"hydra.run.dir={folder}"), "is a link to a target that doesn't exist")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("kind", ["a FIFO", "a link", "a device"])
@pytest.mark.parametrize(
    "name",
    ["result.json", "config.yaml", "adapter/config.json", "adapter/tokenizer.json", "adapter/adapter_config.json"],
)
def test_what_is_no_regular_file_is_not_read(
    name: str, kind: str, run: Path, victim: Path, cli: Callable[..., Finished]
) -> None:
    place = run / name
    shutil.copy(place, victim / "file.txt")
    place.unlink()
    if kind == "a FIFO":
        os.mkfifo(place)
    else:
        place.symlink_to(victim / "file.txt" if kind == "a link" else "/dev/zero")
    refused(cli("predict", str(run), "text=say"), name)
    refused(cli("export", str(run), "merge=false"), name)


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer"])
def test_fifo_in_a_models_folder_is_not_waited_for(
    key: str, tiny_model: Path, tiny_run: list[str], tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "model" / "tokenizer.json")
    refused(cli("check", *tiny_run, f"{key}=model"), f"{key}: ", "tokenizer.json is neither a file nor a folder")


RESULTS: dict[str, tuple[str, str]] = {
    "no metrics": ('{"status": "ok"}', "it has no 'metric'"),
    "metrics of another type": ('{"status": "ok", "metrics": [], "metrics_before": {}}', "its 'metrics' is invalid"),
    "an error that is text": ('{"status": "failed", "error": "text"}', "its 'error' is invalid"),
    "a status that is a list": ('{"status": ["ok"]}', "its 'status' is invalid"),
    "many levels": ("[" * 200_000 + "]" * 200_000, "can't be read"),
    "many mappings": ('{"a":' * 500 + "1" + "}" * 500, "100 nested levels"),
}


@pytest.mark.parametrize("command", [["predict", "text=say"], ["evaluate"], ["export"], ["resume"]])
@pytest.mark.parametrize("kind", RESULTS)
def test_result_that_no_run_writes_is_refused(
    kind: str, command: list[str], run: Path, cli: Callable[..., Finished]
) -> None:
    text, reason = RESULTS[kind]
    (run / "result.json").write_text(text)
    if command != ["resume"]:
        refused(cli(command[0], str(run), *command[1:]), reason)
    else:  # it resumes from a checkpoint, whatever the result says
        assert "HYDRA_FULL_ERROR" not in cli("resume", str(run)).err
