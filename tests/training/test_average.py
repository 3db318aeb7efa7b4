"""The average of the weights (trainer.ema) against one made by hand, and everything that it is kept in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from loraplus_hydra import run
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import register, run_of
from loraplus_hydra.errors import UserError
from loraplus_hydra.training.hf_trainer.average import Average
from loraplus_hydra.training.prepare import prepare
from tests.runs.conftest import AUTO
from tests.support.forking import differences, lines

DECAY = 0.8
AVERAGED = (
    *("trainer.ema=0.8", "optimizer.lr=1e-2", "trainer.eval_steps=2", "trainer.save_steps=1"),
    *("trainer.save_total_limit=10", "+adapter.modules_to_save=[norm]", "model.add_tokens=[new_a]"),
)
SHORT = ("trainer.max_steps=8", "trainer.logging_steps=3", "trainer.save_steps=2", "adapter.lora_dropout=0.1")
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def averaged(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average, beside `plain`, the same run without one."""
    folder = tmp_path_factory.mktemp("ema")
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        for name, changes in (("run", []), ("plain", ["trainer.ema=null"])):
            run(run_of(hydra_compose("config", overrides=[*tiny_run, *AVERAGED, *changes])), folder / name)
    return folder / "run"


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_the_saved_average_is_the_one_made_by_hand(
    averaged: Path, tiny_run: list[str], compose: Callable[..., Any]
) -> None:
    start = get_peft_model_state_dict(prepare(compose(*tiny_run, *AVERAGED)).model, save_embedding_layers=False)
    expected = {name: tensor.detach().double().clone() for name, tensor in start.items()}
    for step in range(1, 5):
        weights = load_file(averaged / "checkpoints" / f"checkpoint-{step}" / FILE)
        expected = {name: DECAY * mean + (1 - DECAY) * weights[name].double() for name, mean in expected.items()}
    found = load_file(averaged / "adapter_ema" / FILE)
    assert found.keys() == expected.keys()
    parts = ("lora_A", "lora_B", "model.norm", "token_adapter")
    assert all(any(part in name for name in found) for part in parts), found.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-8), name
    last = load_file(averaged / "adapter" / FILE)
    assert all(not torch.equal(tensor, last[name]) for name, tensor in found.items() if tensor.any())


def test_the_average_changes_nothing_of_the_training(averaged: Path) -> None:
    plain = averaged.parent / "plain"
    assert (averaged / "adapter" / FILE).read_bytes() == (plain / "adapter" / FILE).read_bytes()
    assert not (plain / "adapter_ema").exists()
    assert not list(plain.rglob("ema.safetensors"))
    kept = [{key: value for key, value in line.items() if "_ema_" not in key} for line in lines(averaged)]
    assert kept == lines(plain)


def test_the_averages_metrics_are_those_of_its_adapter(averaged: Path, cli: Callable[..., Any]) -> None:
    logged = [line for line in lines(averaged) if "eval_loss" in line]
    assert [line["step"] for line in logged] == [0, 2, 4]
    assert all("eval_ema_loss" in line for line in logged)
    assert logged[0]["eval_ema_loss"] == logged[0]["eval_loss"]
    metrics = result(averaged)["metrics"]
    assert metrics["eval_ema_loss"] != metrics["eval_loss"]
    for chosen, name in (("true", "eval_ema_loss"), ("false", "eval_loss")):
        ended = cli("evaluate", str(averaged), f"ema={chosen}", f"out={chosen}.json")
        assert (ended.status, f"at the end of training: {metrics[name]:.6g}" in ended.out) == (0, True), ended.out
        found = json.loads(Path(f"{chosen}.json").read_text())
        assert found["eval_loss"] == pytest.approx(metrics[name], rel=1e-5)
        assert "eval_ema_loss" not in found


def test_predict_and_export_take_the_average(averaged: Path, cli: Callable[..., Any]) -> None:
    assert cli("export", str(averaged), "ema=true", "merge=false", "to=exported").status == 0
    assert Path("exported", FILE).read_bytes() == (averaged / "adapter_ema" / FILE).read_bytes()
    card = Path("exported", "README.md").read_text()
    (row,) = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| eval_loss "))
    own = result(averaged)
    assert float(row[2]) == pytest.approx(own["metrics"]["eval_ema_loss"], rel=1e-5)
    # Answers and training loss are those of the weights
    assert own["samples"]
    assert not [told for told in ("Held-out prompts:", "train_loss") if told in card]
    assert cli("predict", str(averaged), "ema=true", "text=one", "max_new_tokens=2").status == 0
    plain = str(averaged.parent / "plain")
    for refused, told in (
        (["predict", plain, "text=one", "ema=true"], "ema: the run in"),
        (["export", str(averaged), "ema=true", "checkpoint=newest"], "ema: a checkpoint's average is no adapter"),
    ):
        ended = cli(*refused)
        assert (ended.status, told in ended.err) == (1, True), ended.err


def test_an_edited_average_is_refused(averaged: Path, cli: Callable[..., Any]) -> None:
    file = averaged / "adapter_ema" / FILE
    before = file.read_bytes()
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    try:
        ended = cli("predict", str(averaged), "ema=true", "text=one")
        assert (ended.status, "has changed since the run" in ended.err) == (1, True), ended.err
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("adapter", ["lora", "pissa"])
def test_a_stopped_run_resumes_to_the_bits(
    adapter: str, stopped: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *SHORT, "trainer.ema=0.9", "optimizer.lr=1e-2", f"adapter={adapter}"]
    run(compose(*overrides), tmp_path / "unbroken")
    stopped(tmp_path / "broken", *overrides, at=5)
    assert run(compose(*overrides, AUTO), tmp_path / "broken").resumed_at == [5]
    assert differences(tmp_path / "broken", tmp_path / "unbroken") == []
    ours, theirs = (tmp_path / name / "adapter_ema" / FILE for name in ("broken", "unbroken"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_resume_may_switch_the_average_on_and_off(
    cli: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    assert cli(*tiny_run, "hydra.run.dir=run", "trainer.max_steps=2").status == 0
    ended = cli("resume", "run", "trainer.max_steps=3", "trainer.ema=0.5")
    assert (ended.status, "has no ema.safetensors, so it begins with" in ended.out) == (0, True), ended.err
    assert {"adapter", "adapter_ema"} <= result(tmp_path / "run")["inputs"].keys()
    assert (tmp_path / "run" / "adapter_ema").is_dir()
    assert cli("resume", "run", "trainer.max_steps=4", "trainer.ema=null").status == 0
    assert not (tmp_path / "run" / "adapter_ema").exists()
    assert "adapter_ema" not in result(tmp_path / "run")["inputs"]


def test_an_average_that_is_switched_on_after_the_best_checkpoint_begins_there(
    cli: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    words = ["+trainer.load_best_model_at_end=true", "trainer.eval_steps=1", "trainer.save_steps=1"]
    assert cli(*tiny_run, *words, "hydra.run.dir=run", "trainer.max_steps=2", "optimizer.lr=1e-2").status == 0
    # At a rate that is far too high, no later step is better
    ended = cli("resume", "run", "trainer.max_steps=3", "trainer.ema=0.5", "optimizer.lr=10")
    assert ended.status == 0, ended.err
    assert result(tmp_path / "run")["best"]["step"] < 3
    assert "has no ema.safetensors" in ended.out
    weights, averages = (load_file(tmp_path / "run" / name / FILE) for name in ("adapter", "adapter_ema"))
    assert weights.keys() == averages.keys()
    assert all(torch.equal(tensor, averages[name]) for name, tensor in weights.items())


def test_an_average_of_another_model_is_refused(tmp_path: Path) -> None:
    average = Average(torch.nn.Linear(2, 2))
    file = tmp_path / "ema.safetensors"
    save_file({"other": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="doesn't belong to this run"):
        average.load(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="can't be read"):
        average.load(file)


def test_check_refuses_what_cannot_be_averaged(cli: Callable[..., Any], tiny_run: list[str]) -> None:
    for value in ("1", "often"):
        ended = cli("check", *tiny_run, f"trainer.ema={value}")
        assert (ended.status, "trainer.ema" in ended.err) == (1, True), ended.err
    for chosen, told in (
        ("+trainer.fsdp=full_shard", "needs whole tensors"),
        ("adapter=adalora", "sets weights to zero while it trains"),
    ):
        ended = cli("check", *tiny_run, "trainer.ema=0.99", chosen)
        assert (ended.status, told in ended.err) == (1, True), ended.err
