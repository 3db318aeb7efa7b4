"""Existing adapters: continued by a run, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplus_hydra import run
from loraplus_hydra.models.adapter_files import stored_adapter
from tests.conftest import Finished


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register

    register()
    GlobalHydra.instance().clear()
    folder = tmp_path_factory.mktemp("first") / "run"
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        config = compose("config", overrides=[*tiny_run, "adapter.r=4", "task.samples=0"])
    run(config, folder)
    return folder


@pytest.mark.parametrize("adapter", [["adapter=existing"], ["adapter=lora", "adapter.r=4"]])
@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_run_continues_an_adapter(
    inside: str, adapter: list[str], first_run: Path, tiny_run: list[str], compose: Any, tmp_path: Path
) -> None:
    path = f"adapter.path={first_run / inside}"
    second = run(compose(*tiny_run, *adapter, path, "task.samples=0"), tmp_path / "second")
    ended = json.loads((first_run / "result.json").read_text())["metrics"]["eval_loss"]
    assert second.metrics_before["eval_loss"] == pytest.approx(ended, abs=1e-6)
    assert second.value < ended
    tensors = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first_run, tmp_path / "second")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_adapter_inside_an_adapters_folder_is_not_read(inside: str, first_run: Path, tmp_path: Path) -> None:
    # As `cp -r other/adapter copy/adapter` leaves it; the other's tensors are zeros
    own = tmp_path / "copy" / "adapter"
    shutil.copytree(first_run / "adapter", own)
    shutil.copytree(own, own / "adapter")
    tensors = load_file(own / "adapter_model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, own / "adapter" / "adapter_model.safetensors")
    stored = stored_adapter(str(tmp_path / "copy" / inside))
    read = load_file(stored.folder / "adapter_model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.r=8"], "adapter.r: is 8, but 4 in the adapter at adapter.path; adapter=existing"),
        (["adapter.r=4", "adapter.use_dora=true"], "adapter.use_dora: is True, but None in the adapter"),
        (["adapter.r=4", "adapter.target_modules=[q_proj]"], "in the adapter, but"),
        (["adapter.r=4", "adapter.lora_alpha=32"], "adapter.lora_alpha: is 32, but 16 in the adapter"),
    ],
)
def test_an_adapter_that_is_not_as_the_config_says_is_refused(
    overrides: list[str], message: str, first_run: Path, tiny_run: list[str], cli: Callable[..., Finished]
) -> None:
    overrides = [f"+{text}" if "use_dora" in text else text for text in overrides]
    ended = cli("check", *tiny_run, f"adapter.path={first_run}", *overrides)
    assert ended.status == 1
    assert message in ended.err


def test_an_adapter_that_cannot_be_continued_is_refused(
    first_run: Path, tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path, checkpoints: Any
) -> None:
    def message(folder: Path, *overrides: str) -> str:
        ended = cli("check", *tiny_run, "adapter=existing", f"adapter.path={folder}", *overrides)
        assert ended.status == 1
        assert "Traceback" not in ended.err
        return ended.err

    assert "there is no adapter_config.json" in message(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(first_run / "adapter", broken)
    weights = load_file(broken / "adapter_model.safetensors")
    (broken / "adapter_model.safetensors").unlink()
    torch.save(weights, broken / "adapter_model.bin")
    assert "only safetensors are read" in message(broken)
    save_file(
        {name: tensor[:, :-1].contiguous() for name, tensor in weights.items()}, broken / "adapter_model.safetensors"
    )
    assert "in the adapter, but" in message(broken)
    (broken / "adapter_config.json").write_text("{}")
    assert "can't be read" in message(broken)
    (broken / "adapter_config.json").write_text('{"peft_type": "NOTHING"}')
    assert "can't be read" in message(broken)
    assert "the adapter was trained on" in message(first_run, f"model.path={checkpoints('llama')}")


def test_existing_needs_a_path(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    ended = cli("check", *tiny_run, "adapter=existing")
    assert ended.status == 1
    assert "adapter.path: is not set" in ended.err
    ended = cli("check", *tiny_run, "adapter=existing", "adapter.path=null")
    assert ended.status == 1
    assert "adapter.path: is not set, and adapter._target_ is not set either" in ended.err
