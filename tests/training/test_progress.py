"""The progress of training: speed and the time that is left."""

from __future__ import annotations

import io
import logging
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loraplus_hydra.training.hf_trainer.callbacks import ShowProgress
from loraplus_hydra.training.measure import Throughput
from loraplus_hydra.training.progress import ProgressDisplay, TimeLeft, times_left


class Clock:
    """A clock that only `wait` moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 120)), st.data())
def test_what_happens_every_so_many_steps_and_at_the_end_is_counted(
    steps: int, every: int | None, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps))
    happens = [one for one in range(1, steps + 1) if one == steps or (every and one % every == 0)]
    assert times_left(step, steps, every) == sum(one > step for one in happens)


def test_time_left_counts_evaluations_and_saves() -> None:
    """Steps of a second, evaluations of 20 and saves of 5 seconds, with a slow first step and evaluation."""
    clock = Clock()
    left = TimeLeft(300, 75, 100, clock=clock)
    assert left.seconds(0) is None
    clock.wait(60)
    left.done("evaluation")  # before the first step
    estimates = {}
    for step in range(1, 301):
        clock.wait(10 if step == 1 else 1)
        left.done("step")
        if step % 75 == 0 or step == 300:
            clock.wait(20)
            left.done("evaluation")
        if step % 100 == 0:
            clock.wait(5)
            left.done("save")
        estimates[step] = (clock.now, left.seconds(step))
    end = clock.now
    assert estimates[300][1] == 0
    for step in range(100, 290):
        now, estimate = estimates[step]
        assert estimate == pytest.approx(end - now, rel=0.2), step


def test_throughput_is_of_the_steps_since_the_last_line() -> None:
    speed = Throughput()
    assert speed.take() is None
    speed.tokens, speed.seconds = 1000, 4.0
    assert speed.take() == 250
    assert speed.take() is None


@pytest.mark.parametrize("width", [80, 160])
def test_bar_fits_on_one_line(width: int) -> None:
    display = ProgressDisplay(bar=True)
    screen = io.StringIO()
    display.bar.live.console = Console(file=screen, width=width, force_terminal=True, legacy_windows=False)
    display.begin(0, 10_000)
    display.report(4_000, 10_000, {"loss": 3.41234, "eval_loss": 3.51234}, 1234.5, 4521)
    display.advance(4_000, 4521)
    display.bar.refresh()
    display.evaluating(3, 26)
    display.bar.refresh()
    display.close()
    shown = screen.getvalue()
    assert "loss 3.4123  eval_loss 3.5123" in shown
    assert "evaluating 3 of 26" in shown
    assert "4000/10000" in shown
    assert "1.2k tokens/s  1:15:21 left" in shown


def test_messages_stand_in_lines_of_their_own_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    handler = logging.StreamHandler(screen)
    log = logging.getLogger("loraplus_hydra")
    log.addHandler(handler)
    try:
        display = ProgressDisplay(bar=True)
        display.bar.live.console = Console(file=screen, width=80, force_terminal=True, legacy_windows=False)
        display.begin(0, 10)
        log.warning("a message")
        display.close()
    finally:
        log.removeHandler(handler)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "a message" in [line.rpartition("\r")[2] for line in plain.splitlines(keepends=False)]
    assert handler.stream is screen


@pytest.mark.parametrize(
    ("metric", "logged", "expected"),
    [
        ("eval_accuracy", {"eval_loss": 1.5, "eval_accuracy": 0.75}, {"eval_accuracy": 0.75}),
        ("eval_accuracy", {"eval_loss": 1.5}, {"eval_loss": 1.5}),  # of the rows that `forgetting` names
        ("eval_loss", {"eval_loss": 1.5, "eval_entropy": 0.5}, {"eval_loss": 1.5}),
        ("eval_accuracy", {"loss": 2.0, "grad_norm": 1.0}, {"loss": 2.0}),
        ("eval_accuracy", {"train_runtime": 1.0}, None),
    ],
)
def test_an_evaluation_is_shown_by_the_tasks_metric(
    metric: str, logged: dict[str, float], expected: dict[str, float] | None
) -> None:
    reported: list[Any] = []
    display = SimpleNamespace(report=lambda _step, _steps, values, *_: reported.append(values))
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)
    shown = ShowProgress(display, SimpleNamespace(speed=None))  # type: ignore[arg-type]
    shown.on_log(SimpleNamespace(metric_for_best_model=metric), state, None, logged)
    assert reported == ([] if expected is None else [expected])
