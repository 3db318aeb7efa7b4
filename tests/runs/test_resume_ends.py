"""Nothing lost at an end: of an epoch, of training that is stopped early, of AdaLoRA's schedule, of all steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from loraplus_hydra import run
from loraplus_hydra.runs import job
from tests.conftest import Finished
from tests.runs.test_resume import AUTO
from tests.support.forking import differences

# At a rate of nothing no evaluation is better than the first.
STILL = ("optimizer.lr=1e-30", "trainer.max_steps=20", "trainer.eval_steps=2", "trainer.early_stopping_patience=3")
EPOCHS = ("trainer.max_steps=-1", "trainer.num_train_epochs=2")  # ten steps each
BY_EPOCH = (*EPOCHS, "trainer.eval_strategy=epoch", "+trainer.logging_strategy=epoch")
ADALORA = ("adapter=adalora", "adapter.tinit=1", "adapter.tfinal=1")


class Killed(BaseException):
    """Ends a run as SIGKILL does."""


@pytest.fixture
def killed(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Train `overrides` in `folder` and be killed before the adapter is saved, or in the evaluation at a step."""

    def train(folder: Path, *overrides: str, in_evaluation_at: int | None = None) -> None:
        evaluate = Trainer.evaluate

        def die(*args: Any) -> None:
            raise Killed

        def evaluate_or_die(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
            if self.state.global_step == in_evaluation_at:
                raise Killed
            return evaluate(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(job, "_save", die)
            patch.setattr(Trainer, "evaluate", evaluate_or_die)
            with pytest.raises(Killed):
                run(compose(*overrides), folder)
        (folder / "result.json").unlink()

    return train


def is_resumed_to_the_same(compose: Callable[..., Any], overrides: list[str], folder: Path) -> bool:
    """Whether the run in `folder`/broken goes on to the bits of one that nothing breaks, which is trained here."""
    run(compose(*overrides), folder / "unbroken")
    run(compose(*overrides, AUTO), folder / "broken")
    assert differences(folder / "broken", folder / "unbroken") == []
    files = [(folder / each / "adapter" / "adapter_config.json").read_text() for each in ("broken", "unbroken")]
    return files[0] == files[1]


@pytest.mark.parametrize("more", [(), ("+trainer.logging_strategy=epoch",)], ids=["lines by steps", "lines by epochs"])
def test_training_that_was_stopped_early_is_over(
    more: tuple[str, ...],
    killed: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, *STILL, "trainer.save_steps=2", *more]
    killed(tmp_path / "broken", *overrides)
    assert is_resumed_to_the_same(compose, overrides, tmp_path)
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["steps"] == 8


def test_more_patience_goes_on(
    killed: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *STILL, "trainer.save_steps=2"]
    killed(tmp_path / "broken", *overrides)
    result = run(compose(*overrides, "trainer.early_stopping_patience=4", AUTO), tmp_path / "broken")
    assert result.steps == 10


@pytest.mark.parametrize(
    ("at", "save"),
    [(5, "steps"), (10, "steps"), (20, "steps"), (10, "epoch"), (10, "best")],
)
def test_end_of_an_epoch_is_logged_and_evaluated_when_stopped_there(
    at: int,
    save: str,
    stopped: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, *BY_EPOCH, f"trainer.save_strategy={save}", "trainer.save_steps=3"]
    stopped(tmp_path / "broken", *overrides, at=at)
    assert is_resumed_to_the_same(compose, overrides, tmp_path)
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["resumed_at"] == [at]


@pytest.mark.parametrize(("step", "save"), [(10, 10), (20, 3)])
def test_end_of_an_epoch_is_logged_and_evaluated_when_killed_there(
    step: int,
    save: int,
    killed: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, *BY_EPOCH, f"trainer.save_steps={save}"]
    killed(tmp_path / "broken", *overrides, in_evaluation_at=step)
    assert is_resumed_to_the_same(compose, overrides, tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        ("trainer.max_steps=8", "trainer.eval_strategy=epoch", "+trainer.logging_strategy=epoch"),
        ("trainer.max_steps=8", "trainer.eval_strategy=no", "trainer.logging_steps=3"),
        (*EPOCHS, "trainer.eval_steps=10", "+trainer.logging_strategy=epoch"),
    ],
    ids=["in an epoch", "steps without a line", "evaluated by steps"],
)
def test_killed_before_the_adapter_a_run_has_all_lines(
    more: tuple[str, ...],
    killed: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, "trainer.save_steps=2", *more]
    killed(tmp_path / "broken", *overrides)
    assert is_resumed_to_the_same(compose, overrides, tmp_path)
    ends = [json.loads((tmp_path / each / "result.json").read_text()) for each in ("broken", "unbroken")]
    told = [{key: value for key, value in end["metrics"].items() if "per_second" not in key} for end in ends]
    assert [one["eval_num_tokens"] for one in told] == [told[1]["eval_num_tokens"]] * 2


def test_adalora_killed_before_the_adapter_has_the_ranks_that_were_kept(
    killed: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *ADALORA, "trainer.max_steps=8", "trainer.save_steps=2"]
    killed(tmp_path / "broken", *overrides)
    assert is_resumed_to_the_same(compose, overrides, tmp_path)
    config = json.loads((tmp_path / "broken" / "adapter" / "adapter_config.json").read_text())
    assert not all(kept for pattern in config["rank_pattern"].values() for kept in pattern)


@pytest.mark.parametrize("eval_strategy", ["steps", "epoch"])
def test_stop_at_an_evaluation_that_is_no_better_writes_a_checkpoint(
    eval_strategy: str,
    stopped: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, *EPOCHS, "optimizer.lr=1e-30", "trainer.save_strategy=best", "trainer.eval_steps=10"]
    overrides.append(f"trainer.eval_strategy={eval_strategy}")
    stopped(tmp_path / "broken", *overrides, at=20)
    assert is_resumed_to_the_same(compose, overrides, tmp_path)
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["resumed_at"] == [20]


def test_fewer_epochs_than_were_trained_are_refused(
    cli: Callable[..., Finished],
    killed: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, "trainer.max_steps=-1", "trainer.num_train_epochs=2", "trainer.save_steps=3"]
    killed(tmp_path / "run", *overrides, "trainer.eval_steps=16", in_evaluation_at=16)
    finished = cli("resume", "run", "trainer.num_train_epochs=1")
    assert finished.status == 1
    told = "trainer.num_train_epochs: the checkpoint is of epoch 1.5, beyond 1"
    assert told in finished.err, finished.err
    assert not (tmp_path / "run" / "adapter").exists()
