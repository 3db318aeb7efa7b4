"""Errors beside YAML files of the user: --config-dir and --config-name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished

MINE = "# @package _global_\ndefaults:\n  - override /optimizer: signed\n"
SIGNED = "_target_: torch.optim.SGD\nlr: 1e-3\nweight_decay: 0.0\nnesterov: false\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with an experiment, an optimizer and two configs of the user's own."""
    folder = tmp_path / "own"
    files = {
        "experiment/mine.yaml": MINE,
        "optimizer/signed.yaml": SIGNED,
        "mine.yaml": "defaults:\n  - config\n  - override optimizer: signed\n  - _self_\n",
        "experiment/nested.yaml": "trainer:\n  max_steps: 2\n",
        "run_alone.yaml": "defaults:\n  - run\n  - _self_\n",
        "wrong.yaml": "defaults:\n  - config\n  - _self_\noptimizr:\n  lr: 3\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "words",
    [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]],
)
def test_option_of_an_own_folder_is_no_error_beside_another(
    words: list[str], own: Path, cli: Callable[..., Finished]
) -> None:
    finished = cli(*words, "experiment=mine", "optimizer.nesterov=true", "seed=x")
    assert finished.status == 1
    assert finished.err == "1 error:\n  - seed: 'x' is not a whole number; use a value of that type\n"


def test_key_of_an_own_config_is_no_error_beside_another(own: Path, cli: Callable[..., Finished]) -> None:
    finished = cli("--config-dir", "own", "--config-name", "mine", "optimizer.nesterov=true", "seed=x")
    assert finished.status == 1
    assert finished.err == "1 error:\n  - seed: 'x' is not a whole number; use a value of that type\n"


def test_error_of_an_own_config_is_not_that_of_an_override(own: Path, cli: Callable[..., Finished]) -> None:
    finished = cli("--config-dir", "own", "--config-name", "wrong", "seed=3", "adapter.r=4")
    assert finished.status == 1
    assert "optimizr" in finished.err
    assert "seed" not in finished.err
    assert "adapter.r" not in finished.err
    with_flag = cli("--config-dir", "own", "--config-name", "wrong", "--lr", "3")
    assert with_flag.err.startswith("1 error:\n  - --lr: there is no such flag")


def test_recipe_without_its_first_line_is_told_the_line(own: Path, cli: Callable[..., Finished]) -> None:
    finished = cli("--config-dir", "own", "experiment=nested")
    assert finished.status == 1
    assert "experiment=nested: " in finished.err
    assert "begin it with the line `# @package _global_`" in finished.err
    (own / "experiment" / "nested.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 2\n")
    assert "max_steps: 2" in cli("--config-dir", "own", "experiment=nested", "--cfg", "job", "-p", "trainer").out


def test_relative_config_path_is_told_the_flag_for_a_folder(own: Path, cli: Callable[..., Finished]) -> None:
    finished = cli("--config-path", "own", "--config-name", "mine", "--cfg", "job")
    assert finished.status == 1
    assert finished.err.startswith("1 error:\n  - --config-path: ")
    assert "--config-dir DIR" in finished.err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("~optimizer=sgd", "~optimizer=sgd: deletes nothing, because the config has another value; write ~optimizer"),
        ("~adapter.r=3", "~adapter.r=3: deletes nothing, because the config has another value; write ~adapter.r"),
        ("~model.dtype", "~model.dtype: this key can't be deleted; set another value: model.dtype=..."),
        ("~forgetting", "~forgetting: this key can't be deleted; set another value: forgetting=..."),
        ("~adapter.rr", "~adapter.rr: there is no such key to delete"),
        ("~no.such", "~no.such: there is no such key"),
        ("+optimizer=sgd", "+optimizer=sgd: chooses a second option of the group; remove the plus: optimizer=sgd"),
        ("seed=null", "seed: can't be null; give it a value, or leave it out"),
        ("model.path=null", "model.path: can't be null; give it a value, or leave it out"),
    ],
)
def test_advice_on_deletions_pluses_and_nulls_can_be_followed(
    word: str, told: str, cli: Callable[..., Finished]
) -> None:
    finished = cli(word)
    assert finished.status == 1
    assert told in finished.err


@pytest.mark.parametrize("command", [["check"], []])
@pytest.mark.parametrize("key", ["seed", "allow_changed_inputs"])
def test_deleted_key_that_every_run_needs_is_an_error_before_anything_is_written(
    command: list[str], key: str, tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    finished = cli(*command, *tiny_run, f"~{key}", "hydra.run.dir=new")
    assert finished.status == 1
    assert f"  - {key}: is not set; every run needs this key" in finished.err
    assert "Missing key" not in finished.err
    assert not (tmp_path / "new").exists()


def test_config_without_this_programs_own_settings_is_told_how_to_begin(
    own: Path, cli: Callable[..., Finished]
) -> None:
    finished = cli("--config-dir", "own", "--config-name", "run_alone", "hydra.run.dir=new")
    assert finished.status == 1
    assert "--config-name: " in finished.err
    assert "its defaults list must begin with `- config`" in finished.err


def test_config_of_another_command_is_an_error_of_its_keys(cli: Callable[..., Finished], tmp_path: Path) -> None:
    finished = cli("--config-name", "predict", "hydra.run.dir=new")
    assert finished.status == 1
    assert "  - seed: is not set" in finished.err
    assert "HYDRA_FULL_ERROR" not in finished.err
    assert not (tmp_path / "new").exists()
