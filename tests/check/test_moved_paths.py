"""A stored run that names a dotted path of before the rooms gets one error, which says how to use its adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf, open_dict

from loraplus_hydra.check.foreign import moved_paths
from loraplus_hydra.io.result import OK, Result
from tests.conftest import Finished

# Where a config had each path, and the name in the message.
MOVED: dict[str, tuple[str, str]] = {
    "loraplus_hydra.toy.trainer.StudentTrainer": ("task._target_", ""),
    "loraplus_hydra.toy.student.AutoStudent": ("task.auto_class", ""),
    "loraplus_hydra.toy.inputs.examples": ("task.examples", ""),
    "loraplus_hydra.toy.inputs.load": ("data._target_", ""),
    "loraplus_hydra.schedule.one_cycle": ("scheduler._target_", ""),
    "loraplus_hydra.trackers.wandb.WandB": ("logger._target_", ""),
    "loraplus_hydra.cli.BeforeRun": ("logger._target_", ""),
    "pkg://loraplus_hydra.embedded/checkpoint": ("model.path", "loraplus_hydra.embedded"),
    "pkg://loraplus_hydra.toy/checkpoint": ("model.tokenizer", "loraplus_hydra.toy"),
}


@pytest.fixture
def stored(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the folder of a finished run with values put into its config."""

    def write(**values: str) -> Path:
        folder = tmp_path / "run"
        (folder / "adapter").mkdir(parents=True)
        config = compose(*tiny_run)
        OmegaConf.resolve(config)
        with open_dict(config):
            for key, value in values.items():
                OmegaConf.update(config, key, value)
        OmegaConf.save(config, folder / "config.yaml")
        Result(status=OK, metric="eval_loss").write(folder)
        return folder

    return write


@pytest.mark.parametrize("path", MOVED)
@pytest.mark.parametrize("command", ["resume", "predict"])
def test_stored_run_with_a_moved_path_gets_one_error(
    command: str, path: str, stored: Callable[..., Path], cli: Callable[..., Finished]
) -> None:
    key, name = MOVED[path]
    folder = stored(**{key: path})
    before = sorted(folder.rglob("*"))
    ended = cli(command, str(folder), *(["text=one"] if command == "predict" else []))
    assert ended.status == 1
    assert "1 error:" in ended.err
    assert f"run: its config names {name or path}, but this version has renamed" in ended.err
    assert f"(adapter=existing adapter.path={folder / 'adapter'}), or load it with PEFT" in ended.err
    assert sorted(folder.rglob("*")) == before


def test_all_moved_paths_are_in_the_one_error(stored: Callable[..., Path], cli: Callable[..., Finished]) -> None:
    paths = ("loraplus_hydra.schedule.one_cycle", "loraplus_hydra.toy.inputs.load")
    folder = stored(**{"scheduler._target_": paths[0], "data._target_": paths[1]})
    with (folder / "config.yaml").open("a") as file:
        file.write("no_such_key: 1\n")
    ended = cli("resume", str(folder))
    assert "1 error:" in ended.err
    assert f"its config names {', '.join(paths)}, but this version" in ended.err


def test_resume_may_name_the_new_path(stored: Callable[..., Path], cli: Callable[..., Finished]) -> None:
    folder = stored(**{"logger._target_": "loraplus_hydra.trackers.tensorboard.TensorBoard"})
    ended = cli("resume", str(folder), "logger._target_=loraplus_hydra.training.trackers.tensorboard.TensorBoard")
    assert "this version has renamed" not in ended.err


def test_every_path_that_the_options_name_exists(config_paths: list[Path]) -> None:
    for file in config_paths:
        assert moved_paths(OmegaConf.to_container(OmegaConf.load(file))) == [], file


@pytest.fixture
def config_paths() -> list[Path]:
    """Return the YAML files of all options."""
    from loraplus_hydra.config.locations import config_folder

    return sorted(config_folder().glob("*/*.yaml"))
