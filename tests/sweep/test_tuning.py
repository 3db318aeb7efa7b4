"""The search of `tune`: candidates, cost, rungs, and the decision between two finalists."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loraplus_hydra.sweep.halving import Stop
from loraplus_hydra.sweep.tuning import (
    Candidate,
    candidates,
    cost,
    number_of_rates,
    rates_around,
    rung_step,
    stops,
    verdict,
)

LOSSES = st.lists(st.floats(1, 5), min_size=2, max_size=6)


def test_candidates_are_all_pairs_of_eta_b_and_ratio() -> None:
    assert len(candidates([1e-3, 1.0000001e-3], [1])) == 1  # equal in an override
    found = candidates([1e-2, 1e-3, 1e-3], [4, 1])
    assert found == [Candidate(1e-3, 1), Candidate(1e-3, 4), Candidate(1e-2, 1), Candidate(1e-2, 4)]
    assert [one.eta_A for one in found] == [1e-3, 2.5e-4, 1e-2, 2.5e-3]


def test_rates_are_a_factor_of_three_apart_around_the_centre() -> None:
    assert rates_around(4e-3, 5) == [4.4e-4, 1.3e-3, 4e-3, 1.2e-2, 3.6e-2]


def test_cost_is_counted_by_hand() -> None:
    # 15 to a sixteenth, 5 to a quarter, 2 to a half, 2 x 2 more seeds to a half, 1 to the end
    assert cost(15, 3, None) == 15 / 16 + 5 * 3 / 16 + 2 / 4 + 4 / 2 + 1 / 2
    assert cost(2, 3, None) == 2 / 16 + 2 * 3 / 16 + 2 / 4 + 4 / 2 + 1 / 2
    # In 24 steps both rungs are at step 6: all 15 to 6, two to 12, two more seeds of both to 12, one to 24
    assert cost(15, 3, 24) == (15 * 6 + 2 * 6 + 4 * 12 + 12) / 24
    # Warm-up of 120 of 400 steps: no rung before it
    assert cost(15, 3, 400, 120) == (15 * 120 + 2 * 80 + 4 * 200 + 200) / 400


@given(st.floats(3, 12), st.integers(1, 5), st.integers(2, 5), st.one_of(st.none(), st.integers(1, 500)))
def test_as_many_rates_as_the_budget_allows(budget: float, ratios: int, seeds: int, steps: int | None) -> None:
    number = number_of_rates(budget, ratios, seeds, steps)
    assert number in (3, 5, 7, 9)
    assert number == 3 or cost(number * ratios, seeds, steps) <= budget
    assert number == 9 or cost((number + 2) * ratios, seeds, steps) > budget


def test_two_candidates_stay_at_a_quarter_of_the_steps() -> None:
    assert stops(15, 433, 6) == (Stop(27, 5), Stop(108, 2))
    assert stops(3, 433, 6) == (Stop(27, 3), Stop(108, 2))
    assert stops(2, 433, 6) == (Stop(27, 3), Stop(108, 2))  # for a search with more candidates in the same folder
    assert stops(15, 24, 6) == (Stop(6, 2),)  # both rungs are at step 6
    assert stops(15, 4, 6) == (Stop(4, 2),)  # at the last step
    assert [rung_step(1 / 2, steps, 6) for steps in (433, 8, 4)] == [216, 6, 4]


@given(LOSSES, st.data())
def test_verdict_is_the_paired_t_test(first: list[float], data: st.DataObject) -> None:
    second = data.draw(st.lists(st.floats(1, 5), min_size=len(first), max_size=len(first)))
    found = verdict(first, second, greater_is_better=False)
    assert found.difference == pytest.approx(statistics.fmean(second) - statistics.fmean(first), abs=1e-12)
    if found.error > 1e-9:
        interval = stats.ttest_rel(second, first).confidence_interval(0.95)
        assert interval.low == pytest.approx(found.difference - found.quantile * found.error, abs=1e-9)
        assert interval.high == pytest.approx(found.difference + found.quantile * found.error, abs=1e-9)
    assert verdict(first, second, greater_is_better=True).difference == pytest.approx(-found.difference, abs=1e-12)


def test_clear_is_beyond_the_noise_and_the_spread() -> None:
    # The seeds move both alike: the difference is 0.020, 0.021 and 0.019
    shared = verdict([3.400, 3.405, 3.395], [3.420, 3.426, 3.414], greater_is_better=False)
    assert shared.quantile == pytest.approx(4.303, abs=1e-3)
    assert shared.is_clear
    # As sharp, but a single candidate moves more than that between seeds
    assert not verdict([3.40, 3.45, 3.35], [3.420, 3.471, 3.369], greater_is_better=False).is_clear
    # The seeds disagree
    assert not verdict([3.40, 3.40, 3.40], [3.42, 3.39, 3.42], greater_is_better=False).is_clear
    assert not verdict([0.9, 0.9], [0.9, 0.9], greater_is_better=True).is_clear
