"""Nothing is lost at an end: of an epoch, of early stopping, of AdaLoRA's schedule, of all steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer

from loraplus_hydra.errors import ConfigErrors
from tests.conftest import Finished
from tests.runs.conftest import Trial

# At a rate of nothing no evaluation is better than the first.
STILL = (
    *("optimizer.lr=1e-30", "trainer.max_steps=20", "trainer.eval_steps=2", "trainer.early_stopping_patience=3"),
    "trainer.save_steps=2",
)
EPOCHS = ("trainer.max_steps=-1", "trainer.num_train_epochs=2")  # ten steps each
ROWS = 38  # of training
BY_EPOCH = (*EPOCHS, "trainer.eval_strategy=epoch", "+trainer.logging_strategy=epoch")
ADALORA = ("adapter=adalora", "adapter.tinit=1", "adapter.tfinal=1")


@pytest.mark.parametrize(
    "more",
    [pytest.param((), marks=pytest.mark.slow), ("+trainer.logging_strategy=epoch",)],
    ids=["lines by steps", "lines by epochs"],
)
def test_training_that_was_stopped_early_is_over(more: tuple[str, ...], trial: Trial) -> None:
    trial.kill(*STILL, *more)
    assert trial.resume_to_the_same(*STILL, *more).steps == 8


def test_more_patience_goes_on(trial: Trial) -> None:
    trial.kill(*STILL)
    assert trial.resume(*STILL, "trainer.early_stopping_patience=4").steps == 10


def test_training_that_was_stopped_early_has_no_other_rates(trial: Trial) -> None:
    trial.kill(*STILL)
    with pytest.raises(ConfigErrors, match=r"all 8 steps are done, .* loraplus\.ratio: "):
        trial.resume(*STILL, "loraplus.ratio=2")


@pytest.mark.parametrize(
    ("at", "save"),
    [
        *((10, "steps"), (20, "steps"), (10, "best")),
        *(pytest.param(at, save, marks=pytest.mark.slow) for at, save in ((5, "steps"), (10, "epoch"))),
    ],
)
def test_end_of_an_epoch_is_logged_and_evaluated_when_stopped_there(at: int, save: str, trial: Trial) -> None:
    overrides = (*BY_EPOCH, f"trainer.save_strategy={save}", "trainer.save_steps=3")
    trial.stop(*overrides, at=at)
    assert trial.resume_to_the_same(*overrides).resumed_at == [at]


@pytest.mark.parametrize(("step", "save"), [(10, 10), pytest.param(20, 3, marks=pytest.mark.slow)])
def test_end_of_an_epoch_is_logged_and_evaluated_when_killed_there(step: int, save: int, trial: Trial) -> None:
    overrides = (*BY_EPOCH, f"trainer.save_steps={save}")
    trial.kill(*overrides, in_evaluation_at=step)
    trial.resume_to_the_same(*overrides)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(
            ("trainer.max_steps=8", "trainer.eval_strategy=epoch", "+trainer.logging_strategy=epoch"),
            marks=pytest.mark.slow,
        ),
        ("trainer.max_steps=8", "trainer.eval_strategy=no", "trainer.logging_steps=3"),
        (*EPOCHS, "trainer.eval_steps=10", "+trainer.logging_strategy=epoch"),
    ],
    ids=["in an epoch", "steps without a line", "evaluated by steps"],
)
def test_killed_before_the_adapter_a_run_has_all_lines(more: tuple[str, ...], trial: Trial) -> None:
    trial.kill("trainer.save_steps=2", *more)
    trial.resume_to_the_same("trainer.save_steps=2", *more)
    ends = [json.loads((each / "result.json").read_text())["metrics"] for each in (trial.broken, trial.unbroken)]
    assert ends[0]["eval_num_tokens"] == ends[1]["eval_num_tokens"]


def test_adalora_killed_before_the_adapter_has_the_ranks_that_were_kept(trial: Trial) -> None:
    overrides = (*ADALORA, "trainer.max_steps=8", "trainer.save_steps=2")
    trial.kill(*overrides)
    trial.resume_to_the_same(*overrides)
    config = json.loads((trial.broken / "adapter" / "adapter_config.json").read_text())
    assert not all(kept for pattern in config["rank_pattern"].values() for kept in pattern)


@pytest.mark.parametrize("eval_strategy", [pytest.param("steps", marks=pytest.mark.slow), "epoch"])
def test_stop_at_an_evaluation_that_is_no_better_writes_a_checkpoint(eval_strategy: str, trial: Trial) -> None:
    overrides = (*EPOCHS, "optimizer.lr=1e-30", "trainer.save_strategy=best", "trainer.eval_steps=10")
    overrides = (*overrides, f"trainer.eval_strategy={eval_strategy}")
    trial.stop(*overrides, at=20)
    assert trial.resume_to_the_same(*overrides).resumed_at == [20]


def test_fewer_epochs_than_were_trained_are_refused(cli: Callable[..., Finished], trial: Trial) -> None:
    overrides = (*EPOCHS, "trainer.save_steps=3", "trainer.eval_steps=16")
    trial.kill(*overrides, in_evaluation_at=16)
    finished = cli("resume", str(trial.broken), "trainer.num_train_epochs=1")
    assert finished.status == 1
    assert "trainer.num_train_epochs: the checkpoint is of epoch 1.5, beyond 1" in finished.err, finished.err
    assert not (trial.broken / "adapter").exists()


def test_patience_may_begin_with_a_resume(trial: Trial) -> None:
    trial.stop(*(each for each in STILL if "patience" not in each), at=3)
    result = trial.resume(*STILL)
    assert result.steps == 8  # the three evaluations of steps 4, 6 and 8 are no better than that of step 2
    stored = json.loads((trial.broken / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] == 3


@pytest.mark.parametrize(
    ("at", "keys"),
    [
        (10, {"per_device_train_batch_size": 8}),  # behind the first epoch
        (5, {"per_device_train_batch_size": 2}),
        (7, {"gradient_accumulation_steps": 3}),
    ],
)
def test_another_batch_trains_the_rest_of_the_epochs(at: int, keys: dict[str, int], trial: Trial) -> None:
    """Every row is trained on twice, but for the rows of a step that ended between two of the new ones."""
    rows: list[int] = []
    original = Trainer.training_step

    def counted(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return original(self, model, inputs, *args)

    trial.monkeypatch.setattr(Trainer, "training_step", counted)
    trial.stop(*EPOCHS, at=at)
    result = trial.resume(*EPOCHS, *(f"trainer.{key}={value}" for key, value in keys.items()))
    of_step = max(4, math.prod({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **keys}.values()))
    assert 2 * ROWS <= sum(rows) < 2 * ROWS + of_step
    last = trial.broken / "checkpoints" / f"checkpoint-{result.steps}" / "trainer_state.json"
    assert json.loads(last.read_text())["epoch"] == 2
