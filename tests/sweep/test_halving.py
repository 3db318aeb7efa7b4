"""The rungs of successive halving, and the candidates that stay at a rung."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup, get_wsd_schedule

from loraplus_hydra.io.rungs import Rung, add_rung, read_rungs
from loraplus_hydra.loraplus.schedule import highest_rate_step, named_schedule, one_cycle
from loraplus_hydra.sweep.halving import Stop, compare, decide, first_share, job_steps, places, plan

CANDIDATES, STEPS, EARLIEST = st.integers(1, 60), st.integers(1, 2000), st.integers(6, 60)
LOSSES = st.floats(0, 20, allow_nan=False)


def rung(losses: list[float], weights: list[float] | None = None) -> Rung:
    return Rung(0.25, 25, 100, 6, tuple(losses), tuple(weights or [1.0] * len(losses)))


def test_rungs_are_at_a_sixteenth_a_quarter_and_a_half() -> None:
    assert plan(25, 100, 6) == (Stop(6, 8), Stop(25, 2), Stop(50, 1), Stop(75, 1))
    assert plan(9, 433, 6) == (Stop(27, 3), Stop(108, 2), Stop(216, 1), Stop(325, 1))
    assert plan(3, 433, 6) == (
        Stop(108, 2),
        Stop(216, 1),
        Stop(325, 1),
    )  # three stay at the first rung, so there is none
    assert plan(2, 433, 6) == (Stop(216, 1), Stop(325, 1))
    assert plan(1, 433, 6) == ()


def test_no_rung_is_before_the_sixth_step_or_the_end_of_warm_up() -> None:
    assert plan(9, 40, 6) == (Stop(6, 3), Stop(10, 2), Stop(20, 1), Stop(30, 1))
    assert plan(9, 40, 15) == (Stop(15, 2), Stop(20, 1), Stop(30, 1))  # two rungs at one step: the later one counts
    assert plan(9, 12, 6) == (Stop(6, 1), Stop(9, 1))
    assert plan(9, 6, 6) == ()


def test_a_quarter_of_the_steps_is_planned() -> None:
    assert job_steps(25, plan(25, 100, 6), 100) == 25 * 6 + 8 * 19 + 2 * 25 + 1 * 50
    assert job_steps(25, plan(25, 100, 6), 100) * 1.2 <= 0.20 * 25 * 100
    assert job_steps(8, plan(8, 433, 6), 433) <= 0.27 * 8 * 433


@given(CANDIDATES, STEPS, EARLIEST)
def test_rungs_leave_fewer_candidates_each_time(candidates: int, steps: int, earliest: int) -> None:
    stops = plan(candidates, steps, earliest)
    assert all(earlier.step < later.step and earlier.keep >= later.keep for earlier, later in pairwise(stops))
    assert all(earliest <= stop.step < steps and 1 <= stop.keep < candidates for stop in stops)
    assert all(stop.keep >= 2 for stop in stops if stop.step < round(steps / 2))
    assert (first_share(candidates) is None) == (candidates == 1)
    # Counted by hand: at each step, one for each candidate that remains
    remaining, counted = candidates, 0
    for step in range(steps):
        for stop in stops:
            if stop.step == step:
                remaining = stop.keep
        counted += remaining
    assert job_steps(candidates, stops, steps) == counted


@given(CANDIDATES, STEPS, EARLIEST, st.lists(st.integers(0, 60), min_size=4, max_size=4))
def test_candidates_that_are_as_good_cost_a_fifth_more_at_most(
    candidates: int, steps: int, earliest: int, as_good: list[int]
) -> None:
    stops = plan(candidates, steps, earliest)
    remaining, reached, spent = candidates, 0, 0
    for number, stop in enumerate(stops):
        spent += remaining * (stop.step - reached)
        reached = stop.step
        more = places(candidates, stops, steps, number, spent)
        remaining = min(remaining, stop.keep + min(more, as_good[number]))
    spent += remaining * (steps - reached)
    planned = job_steps(candidates, stops, steps)
    assert spent <= 1.2 * planned + 1e-6
    if planned <= 0.27 * candidates * steps:
        assert spent <= 0.27 * candidates * steps + 1e-6


@given(st.integers(8, 60), st.integers(100, 2000))
def test_eight_settings_and_more_cost_27_percent_at_most(candidates: int, steps: int) -> None:
    assert job_steps(candidates, plan(candidates, steps, 6), steps) <= 0.27 * candidates * steps


def test_one_that_is_as_good_at_half_time_stays_as_long_as_the_budget_lasts() -> None:
    for candidates in (8, 9):
        stops = plan(candidates, 433, 6)
        assert places(candidates, stops, 433, 2, job_steps(candidates, stops, 433) - 217) == 1
    # Eight settings are planned with 892 of 3,464 steps. 27% of these are 935, which leaves 43 from step 216 on
    assert plan(8, 433, 6)[2:] == (Stop(216, 1), Stop(259, 1))


def test_early_near_ties_leave_a_place_for_the_last_decision() -> None:
    stops = plan(25, 100, 6)
    planned = 25 * 6 + 8 * 19 + 2 * 25 + 50  # a fifth more are 80 steps
    at_6, at_25, at_50 = 25 * 6, 25 * 6 + 8 * 19, 25 * 6 + 8 * 19 + (2 + 2) * 25
    assert job_steps(25, stops, 100) == planned
    assert places(25, stops, 100, 0, at_6) == 1  # of 19 steps; two places of 25 are left
    assert places(25, stops, 100, 1, at_25) == 2  # of 25 steps; one place of 25 is left
    assert places(25, stops, 100, 2, at_50) == 1  # of 25 steps, until step 75


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=30))
def test_difference_is_that_of_a_paired_test(pairs: list[tuple[float, float]]) -> None:
    one, other = map(list, zip(*pairs, strict=True))
    difference, error = compare([rung(one)], [rung(other)])
    by_hand = np.array(one) - np.array(other)
    assert difference == pytest.approx(by_hand.mean(), abs=1e-9)
    assert error == pytest.approx(by_hand.std(ddof=1) / math.sqrt(len(pairs)), abs=1e-9)


def test_rows_count_as_often_as_they_have_tokens() -> None:
    one, other = rung([1.0, 3.0], [30, 10]), rung([2.0, 2.0], [30, 10])
    assert one.loss == 1.5
    difference, error = compare([one], [other])
    assert difference == -0.5
    # Each row's part of the difference is (30 * -1 + 15) / 40 = -0.375 and (10 * 1 + 5) / 40 = 0.375
    assert error == pytest.approx(math.sqrt(2 * (0.375**2 + 0.375**2)))


def test_seeds_that_disagree_make_the_error_larger() -> None:
    rows = [2.0, 2.1, 2.2, 2.3]
    agreeing = compare([rung(rows), rung(rows)], [rung([row + 0.1 for row in rows])] * 2)
    disagreeing = compare([rung(rows), rung(rows)], [rung([row + change for row in rows]) for change in (0.0, 0.2)])
    assert agreeing == pytest.approx((-0.1, 0.0))
    assert disagreeing == pytest.approx((-0.1, 0.1))  # two differences, 0 and -0.2: sd 0.1414, over the root of 2


@given(
    st.lists(st.lists(LOSSES, min_size=5, max_size=5), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 12)
)
def test_the_lowest_losses_stay_and_as_good_ones_while_there_is_a_place(
    losses: list[list[float]], keep: int, more: int
) -> None:
    rungs = {str(place): [rung(rows)] for place, rows in enumerate(losses)}
    standings = decide(rungs, keep, more)
    assert sorted(one.name for one in standings) == sorted(rungs)
    assert [one.loss for one in standings] == sorted(one.loss for one in standings)
    assert all(one.stays for one in standings[:keep])
    added = [one for one in standings[keep:] if one.stays]
    as_good = [one for one in standings[keep:] if one.difference <= 2 * one.error]
    assert added == as_good[:more]


def test_nobody_is_clearly_worse_on_a_single_row() -> None:
    standings = decide({"a": [rung([1.0])], "b": [rung([2.0])]}, 1, 1)
    assert [one.stays for one in standings] == [True, True]


def test_rungs_are_read_as_they_were_written(tmp_path: Path) -> None:
    first, second = rung([0.1 + 0.2, 1 / 3]), Rung(108 / 433, 108, 433, 6, (1.0,), (2.0,))
    add_rung(tmp_path, first)
    add_rung(tmp_path, second)
    assert read_rungs(tmp_path) == [first, second]
    for damaged in (
        "",
        "{}",
        "[]",
        '{"rungs": 3}',
        '{"rungs": [{"step": 3}]}',
        '{"rungs": [{"losses": "a", "weights": [1]}]}',
    ):
        (tmp_path / "rungs.json").write_text(damaged)
        assert read_rungs(tmp_path) == []


WHOLE = '{"stop_at": 0.5, "step": 5, "steps": 10, "earliest": 5, "losses": [1, 3.0], "weights": [3, 1], "metric": 0.5}'
HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("text", "damaged"),
    [
        (WHOLE, '"a"'),
        (WHOLE, "null"),
        ('"stop_at": 0.5', '"stop_at": "x"'),
        ('"step": 5', f'"step": {HUGE}'),
        ('"step": 5', '"step": 11'),
        ('"step": 5', '"step": 5.0'),
        ('"steps": 10', f'"steps": {HUGE}'),
        ('"earliest": 5', f'"earliest": {HUGE}'),
        ('"earliest": 5', '"earliest": null'),
        ("[1, 3.0]", f"[1, {HUGE}]"),
        ("[1, 3.0]", "[1, NaN]"),
        ("[1, 3.0]", "[1, true]"),
        ("[1, 3.0]", "[1]"),
        ("[1, 3.0]", "2"),
        ("[3, 1]", "[1, -1]"),
        ("[3, 1]", "[0, 0]"),
        ("[3, 1]", "[1, Infinity]"),
        ("[3, 1]", "[1e308, 1e308]"),
        ('"metric": 0.5', '"metric": "x"'),
        ('"metric": 0.5', '"metric": -Infinity'),
    ],
)
def test_damaged_entry_is_left_out_and_the_others_are_read(text: str, damaged: str, tmp_path: Path) -> None:
    assert text in WHOLE
    (tmp_path / "rungs.json").write_text(f'{{"rungs": [{WHOLE.replace(text, damaged)}, {WHOLE}]}}')
    assert read_rungs(tmp_path) == [Rung(0.5, 5, 10, 5, (1.0, 3.0), (3.0, 1.0), 0.5)]
    assert read_rungs(tmp_path)[0].loss == 1.5


@pytest.mark.parametrize(
    ("factory", "arguments", "step"),
    [
        (get_linear_schedule_with_warmup, {"num_warmup_steps": 10}, 10),
        (get_linear_schedule_with_warmup, {}, 0),
        (get_wsd_schedule, {"warmup_ratio": 0.2, "decay_ratio": 0.3}, 20),
        (named_schedule("constant"), {}, 0),
        (one_cycle, {"pct_start": 0.31}, 30),
        (torch.optim.lr_scheduler.StepLR, {"step_size": 3}, 0),
    ],
)
def test_warm_up_ends_at_the_highest_rate(factory: object, arguments: dict[str, float], step: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 1e-4, "name": "groupA"}])
    optimizer.param_groups[0]["initial_lr"] = 1e-4
    optimizer.param_groups[0]["lr"] = 0.0  # the rate at the first step of a warm-up
    assert highest_rate_step(factory, optimizer, num_training_steps=100, kwargs=arguments) == step  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["lr"] == 0.0
