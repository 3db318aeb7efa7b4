"""The best checkpoint: metric and adapter of one step, from the run's own folder alone, the newest kept beside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.errors import UserError
from loraplus_hydra.io.checkpoints import defect, rotate, seal
from loraplus_hydra.training.hf_trainer.train import best_evaluation
from tests.runs.conftest import Trial
from tests.support.forking import differences, lines

WEIGHTS = "adapter_model.safetensors"
# Called better when it is greater, a loss that falls was best at the first evaluation.
EIGHT = ("trainer.max_steps=8", "trainer.save_steps=2", "trainer.eval_steps=2", "task.greater_is_better=true")
BEST = (*EIGHT, "+trainer.load_best_model_at_end=true")


def kept(folder: Path) -> list[str]:
    """The checkpoints in a run's folder, which are all whole."""
    places = sorted((folder / "checkpoints").glob("checkpoint-*"))
    assert [defect(place) for place in places] == [""] * len(places)
    return [place.name for place in places]


def loss_at(folder: Path, step: int) -> float:
    """The loss of the evaluation at `step`."""
    return next(float(line["eval_loss"]) for line in lines(folder) if line["step"] == step and "eval_loss" in line)


def tell(place: Path, **changed: Any) -> None:
    """Change a checkpoint's trainer_state.json, and write its manifest again so that it looks complete."""
    file = place / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    seal(place)


@pytest.mark.parametrize(
    "load_best",
    [pytest.param((), marks=pytest.mark.slow), ("+trainer.load_best_model_at_end=true",)],
    ids=["last", "best"],
)
def test_checkpoint_of_ctrl_c_stays_at_a_limit_of_one(load_best: tuple[str, ...], trial: Trial) -> None:
    overrides = (*EIGHT, *load_best, "trainer.save_total_limit=1")
    trial.train(*overrides)
    assert kept(trial.unbroken) == ["checkpoint-2", "checkpoint-8"]
    trial.stop(*overrides, at=7)
    assert kept(trial.broken) == ["checkpoint-2", "checkpoint-7"]
    assert trial.resume(*overrides).resumed_at == [7]
    assert differences(trial.broken, trial.unbroken) == []


def test_finished_run_at_a_limit_of_one_is_extended_from_its_last_step(trial: Trial) -> None:
    overrides = (*EIGHT, "trainer.save_total_limit=1")
    trial.train(*overrides, name="broken")
    assert trial.resume(*overrides, "trainer.max_steps=10").resumed_at == [8]


def test_best_checkpoint_that_is_not_there_takes_no_place(tmp_path: Path) -> None:
    for step in (20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, 1, "/another/run/checkpoints/checkpoint-10")
    assert [place.name for place in tmp_path.iterdir()] == ["checkpoint-30"]


def test_metric_and_adapter_are_of_one_step_where_the_best_step_has_no_checkpoint(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        result = run(compose(*tiny_run, *BEST, "trainer.eval_steps=1"), tmp_path)
    assert result.metrics["eval_loss"] == loss_at(tmp_path, 8) < loss_at(tmp_path, 1)
    last = tmp_path / "checkpoints" / "checkpoint-8"
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (last / WEIGHTS).read_bytes()
    assert "the best evaluation is of step 1, which has no checkpoint, so the model is that of step 8" in caplog.text


def test_metric_and_adapter_are_of_the_best_step_that_has_a_checkpoint(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    determine, metric = Trainer._determine_best_metric, {2: 1.0, 3: 2.0}

    def at_three(self: Any, metrics: dict[str, float], trial: Any) -> bool:
        return determine(self, {"eval_loss": metric.get(self.state.global_step, 0.0)}, trial)

    monkeypatch.setattr(Trainer, "_determine_best_metric", at_three)
    result = run(compose(*tiny_run, *BEST, "trainer.eval_steps=1"), tmp_path)
    best = tmp_path / "checkpoints" / "checkpoint-2"
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (best / WEIGHTS).read_bytes()
    assert result.metrics["eval_loss"] == loss_at(tmp_path, 2)


def end(trial: Trial, at: int) -> None:
    """Stop the run in step `at`; at 8, the last, as a kill before the adapter is saved does."""
    if at == 8:
        trial.kill(*BEST)
    else:
        trial.stop(*BEST, at=at)


@pytest.mark.parametrize(
    "at", [7, pytest.param(8, marks=pytest.mark.slow)], ids=["before its last step", "after its last step"]
)
def test_moved_run_ends_with_its_best_adapter(at: int, trial: Trial) -> None:
    trial.train(*BEST)
    end(trial, at)
    moved = trial.broken.rename(trial.folder / "moved")
    assert trial.resume(*BEST, name="moved").resumed_at[-1] == at
    assert differences(moved, trial.unbroken) == []


@pytest.mark.parametrize(
    "at", [pytest.param(7, marks=pytest.mark.slow), 8], ids=["before its last step", "after its last step"]
)
def test_best_checkpoint_that_does_not_count_is_refused(at: int, trial: Trial) -> None:
    end(trial, at)
    os.truncate(trial.broken / "checkpoints" / "checkpoint-2" / WEIGHTS, 10)
    with pytest.raises(UserError, match=r"checkpoint-2, can't be loaded at the end: .* is 10 bytes long"):
        trial.resume(*BEST)
    assert not (trial.broken / "adapter").exists()
    result = trial.resume(*EIGHT, "+trainer.load_best_model_at_end=false")
    assert (result.status, result.metrics["eval_loss"]) == ("ok", loss_at(trial.broken, 8))


@pytest.mark.parametrize("named", ["evil", "evil/checkpoint-2", ".."])
def test_best_checkpoint_of_another_place_is_never_opened(named: str, trial: Trial) -> None:
    import torch
    from safetensors.torch import load_file

    folder, evil = trial.broken, trial.folder / named
    trial.kill(*BEST)
    own = folder / "checkpoints" / "checkpoint-2" / WEIGHTS
    if named != "..":
        evil.mkdir(parents=True)
    shutil.copy(own.parent / "adapter_config.json", evil)
    torch.save({name: weight + 1 for name, weight in load_file(own).items()}, evil / "adapter_model.bin")
    tell(folder / "checkpoints" / "checkpoint-8", best_model_checkpoint=str(evil))
    if Path(named).name == "checkpoint-2":
        trial.resume(*BEST)
        assert (folder / "adapter" / WEIGHTS).read_bytes() == own.read_bytes()
    else:
        with pytest.raises(UserError, match="its name is not a checkpoint's name"):
            trial.resume(*BEST)
        assert not (folder / "adapter").exists()


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_run_from_a_checkpoint_of_another_run_keeps_that_ones_best(step: int, trial: Trial) -> None:
    overrides = (*BEST, "trainer.save_total_limit=null")
    trial.train(*overrides, name="other")
    shutil.copytree(trial.folder / "other", trial.unbroken)  # to compare with
    checkpoint = trial.folder / "other" / "checkpoints" / f"checkpoint-{step}"
    trial.kill(*overrides, f"trainer.resume_from_checkpoint={checkpoint}")
    shutil.rmtree(trial.folder / "other")
    trial.resume(*overrides)
    assert differences(trial.broken, trial.unbroken) == []


@pytest.mark.parametrize("names", [("easy", "quite another text"), ("quite another text", "easy")])
def test_best_of_other_rows_is_not_compared_with_new_ones(names: tuple[str, str], trial: Trial) -> None:
    from tests.support.tiny import write_jsonl

    files = [
        write_jsonl(
            trial.folder / f"{name}.jsonl", [{"prompt": f"{name} {n}", "completion": f" {n}"} for n in range(8)]
        )
        for name in names
    ]
    overrides = ("trainer.max_steps=6", "trainer.save_steps=2", "trainer.eval_steps=2", "optimizer.lr=1e-30")
    overrides = (*overrides, "+trainer.load_best_model_at_end=true", f"data.eval={files[0]}")
    trial.stop(*overrides, at=3)
    result = trial.resume(*overrides, f"data.eval={files[1]}")
    later = [line for line in lines(trial.broken) if "eval_loss" in line and line["step"] > 3]
    assert result.best["step"] in (4, 6)
    assert result.metrics["eval_loss"] == result.best["value"] == min(line["eval_loss"] for line in later)


def test_best_of_another_metric_is_not_compared_with_the_new_one(trial: Trial) -> None:
    overrides = ("trainer.max_steps=6", "trainer.save_steps=2", "trainer.eval_steps=2")
    trial.stop(*overrides, at=3)
    trial.resume(*overrides, "task.metric=eval_mean_token_accuracy", "task.greater_is_better=true")
    stored = json.loads((trial.broken / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    measured = [
        line["eval_mean_token_accuracy"] for line in lines(trial.broken) if line["step"] > 3 and "eval_loss" in line
    ]
    assert stored["best_metric"] == max(measured)


@pytest.mark.parametrize(("greater", "best"), [(False, {"step": 2, "value": 0.1}), (True, {"step": 4, "value": 0.3})])
def test_metric_that_is_not_a_number_is_never_the_best(greater: bool, best: dict[str, float]) -> None:
    """As a correlation of constant answers, before the first step."""
    values = {0: float("nan"), 2: 0.1, 3: float("nan"), 4: 0.3}
    history = [{"step": step, "eval_own": value} for step, value in values.items()]
    assert best_evaluation([*history, {"step": 5, "loss": 0.0}], "eval_own", greater) == best
    assert best_evaluation(history[:1], "eval_own", greater) == {}
