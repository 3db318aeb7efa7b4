"""Signals: kept wherever they come, and an evaluation that one stops is made up."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.interrupts import Interrupted
from loraplus_hydra.training.hf_trainer.resumable_mixin import ResumableMixin
from tests.conftest import Finished
from tests.support.forking import differences, lines

Cli = Callable[..., Finished]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell's background jobs, in which the tests may run, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def _handling(number: int, handler: Callable[[int], None]) -> Iterator[None]:
    """Inside, let `handler` get a signal, as a program around the run may."""
    before = signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_signal_inside_a_collection_is_kept(number: signal.Signals) -> None:
    def collecting(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(collecting)
        os.kill(os.getpid(), number)

    with interrupts.kept_signals(deliver=False):
        gc.callbacks.append(collecting)
        gc.collect()
        assert interrupts.requested() == number
        with pytest.raises(Interrupted) as stopped:
            interrupts.stop_if_asked()
    assert interrupts.status_of(stopped.value) == 128 + number


def test_second_signal_raises_at_once() -> None:
    with interrupts.kept_signals(deliver=False):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.status_of(stopped.value) == 143  # by the first


def test_handlers_of_a_caller_get_the_signal_after_the_block() -> None:
    got: list[int] = []
    with _handling(signal.SIGTERM, got.append):
        keeping = interrupts.kept_signals()
        keeping.__enter__()
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == []
        with pytest.raises(Interrupted):
            keeping.__exit__(None, None, None)
        assert got == [signal.SIGTERM]


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_signal_behind_a_job_ends_the_sweep(
    number: signal.Signals, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.sweep import isolation

    monkeypatch.setattr(isolation, "free_memory", lambda: os.kill(os.getpid(), number))
    toy = ("experiment=toy", "data.width=8", "data.steps=2")
    finished = cli("-m", *toy, "seed=1,2,3", "hydra.sweep.dir=sweep")
    assert finished.status == 128 + number, finished.err
    assert [path.parent.name[:6] for path in (tmp_path / "sweep").glob("*/result.json")] == ["seed-1"]
    assert "1 of 3 jobs run: 1 done" in finished.out
    left = "The sweep was stopped with 2 jobs left: seed=2, seed=3"
    assert left in finished.out.replace("\n", " ")
    assert left in (tmp_path / "sweep" / "report.html").read_text()


EVALUATED = (
    *("trainer.max_steps=4", "trainer.eval_steps=2", "trainer.save_steps=4", "trainer.per_device_eval_batch_size=1"),
    *("adapter.lora_dropout=0.1", "+trainer.load_best_model_at_end=false"),
)


@pytest.fixture
def stopped_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the next evaluation at a step get SIGTERM in its first batch, as a scheduler sends it."""

    def at(step: int) -> None:
        predict = ResumableMixin.prediction_step

        def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = predict(self, *args, **kwargs)
            if self.state.global_step == step and self.is_in_train:
                monkeypatch.setattr(ResumableMixin, "prediction_step", predict)
                os.kill(os.getpid(), signal.SIGTERM)
            return output

        monkeypatch.setattr(ResumableMixin, "prediction_step", signalled)

    return at


@pytest.mark.parametrize("step", [2, 4])
def test_evaluation_that_a_signal_stops_is_made_up(
    step: int,
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
    stopped_in_evaluation: Callable[[int], None],
) -> None:
    run(compose(*tiny_run, *EVALUATED), tmp_path / "unbroken")
    place = tmp_path / "stopped"
    stopped_in_evaluation(step)
    with _handling(signal.SIGTERM, lambda _: None), pytest.raises(Interrupted):
        run(compose(*tiny_run, *EVALUATED), place)
    assert not [line for line in lines(place) if line["step"] == step and "eval_loss" in line]
    state = json.loads((place / "checkpoints" / f"checkpoint-{step}" / "run_state.json").read_text())
    assert state["evaluation_due"] is True
    run(compose(*tiny_run, *EVALUATED, "trainer.resume_from_checkpoint=auto"), place)
    assert differences(place, tmp_path / "unbroken") == []
