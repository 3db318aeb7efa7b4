"""Comparison of settings, against numbers worked out by hand and by other libraries."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraplus_hydra.report import summary
from loraplus_hydra.report.compare import CLEAR, NOISE, ONE_SEED, UNCLEAR, first_reaching, welch
from loraplus_hydra.report.read_job import Point
from loraplus_hydra.report.results import results_of
from tests.support.finished_sweeps import ratio_sweep, write_job


def test_mean_and_spread_over_seeds_are_those_of_the_statistics_module(tmp_path: Path) -> None:
    values = {(1, 1): 3.7, (1, 2): 3.72, (1, 3): 3.75, (8, 1): 3.6, (8, 2): 3.61, (8, 3): 3.68}
    results = ratio_sweep(tmp_path, values)
    assert results.keys == ("loraplus.ratio", "seed")
    for setting in results.settings:
        mine = [value for (ratio, _), value in values.items() if ratio == setting.values["loraplus.ratio"]]
        assert setting.mean == pytest.approx(statistics.fmean(mine))
        assert setting.spread == pytest.approx(numpy.std(mine, ddof=1))
    outcome = results.outcome
    assert outcome.best is not None
    assert outcome.best.values == {"loraplus.ratio": 8}
    assert outcome.best_job is not None
    assert outcome.best_job.folder == "8_1"
    assert outcome.against_baseline is not None
    assert outcome.against_baseline.gain == pytest.approx(11.17 / 3 - 10.89 / 3)


@pytest.mark.parametrize(
    ("plain", "loraplus", "verdict", "sentence"),
    [
        ((3.70,), (3.60,), ONE_SEED, "the noise is unknown"),
        ((3.70, 3.60, 3.80), (3.69, 3.61, 3.77), NOISE, "This can be noise"),
        ((3.70, 3.73), (3.66, 3.69), UNCLEAR, "This may be noise"),
        ((3.70, 3.71, 3.72), (3.60, 3.61, 3.62), CLEAR, "This is more than the noise"),
    ],
)
def test_noise_is_called_noise(
    tmp_path: Path, plain: tuple[float, ...], loraplus: tuple[float, ...], verdict: str, sentence: str
) -> None:
    values = {(1, seed): value for seed, value in enumerate(plain)}
    values |= {(4, seed): value for seed, value in enumerate(loraplus)}
    results = ratio_sweep(tmp_path, values)
    gap = results.outcome.against_baseline
    assert gap is not None
    assert gap.verdict == verdict
    assert gap.wins == sum(mine < theirs for mine, theirs in zip(loraplus, plain, strict=True))
    assert sentence in " ".join(summary.details(results))


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=6),
    st.lists(st.floats(-5, 5), min_size=2, max_size=6),
)
@settings(max_examples=60)
def test_interval_is_scipys(first: list[float], second: list[float]) -> None:
    from scipy.stats import ttest_ind

    assume(min(statistics.variance(first), statistics.variance(second)) > 1e-6)  # scipy loses precision below
    theirs = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert welch(first, second) == pytest.approx((theirs.low, theirs.high), abs=1e-8)


def test_higher_is_better_where_the_task_says_so(tmp_path: Path) -> None:
    values = {(1, 0): 0.80, (4, 0): 0.86, (16, 0): 0.83}
    results = ratio_sweep(tmp_path, values, greater_is_better=True, metric="eval_accuracy")
    assert results.sweep.metric == "eval_accuracy"
    assert [one.values["loraplus.ratio"] for one in results.outcome.ranked] == [4, 16, 1]
    assert results.outcome.against_baseline is not None
    assert results.outcome.against_baseline.gain == pytest.approx(0.06)


def test_about_as_good_as_the_best_is_within_the_seeds_noise(tmp_path: Path) -> None:
    values = {(1, 1): 3.700, (1, 2): 3.720, (4, 1): 3.600, (4, 2): 3.610, (8, 1): 3.606, (8, 2): 3.616}
    values |= {(64, 1): 3.5, (64, 2): 3.9}  # an unstable setting must not decide what noise is
    results = ratio_sweep(tmp_path, values)
    noise = statistics.median(statistics.stdev(pair) for pair in ((3.7, 3.72), (3.6, 3.61), (3.606, 3.616), (3.5, 3.9)))
    assert results.outcome.tolerance.size == pytest.approx(noise)
    assert [one.values["loraplus.ratio"] for one in results.outcome.near] == [8]
    rule = f"(within {noise:.2g}, the median standard deviation over seeds)"
    assert f"1 other setting is about as good as the best {rule}." in summary.details(results)


def test_about_as_good_as_the_best_is_5_percent_of_the_range_with_one_seed(tmp_path: Path) -> None:
    # All are within 1% of the best, which says nothing: the sweep's range is 0.03
    results = ratio_sweep(tmp_path / "a", {(1, 0): 3.63, (4, 0): 3.60, (8, 0): 3.601, (16, 0): 3.602})
    assert results.outcome.tolerance.size == pytest.approx(0.0015)
    assert [one.values["loraplus.ratio"] for one in results.outcome.near] == [8]
    assert "within 0.0015, 5% of the sweep's range" in " ".join(summary.details(results))
    diverged = {(ratio, 0): 3.60 + 0.01 * ratio for ratio in range(1, 11)} | {(64, 0): 4e7}
    results = ratio_sweep(tmp_path / "b", diverged)
    assert results.outcome.tolerance.size == pytest.approx(0.05 * 0.09)
    assert "No other setting is about as good as the best" in " ".join(summary.details(results))


def test_plain_lora_is_named_when_it_is_best(tmp_path: Path) -> None:
    results = ratio_sweep(tmp_path, {(1, 0): 3.60, (4, 0): 3.65, (16, 0): 3.70})
    assert results.outcome.best is results.outcome.baseline
    details = " ".join(summary.details(results))
    assert "Plain LoRA is the best here" in details
    assert "by 0.0500" in details
    assert summary.speed_sentence(results) == ""


def test_sweep_without_ratio_1_has_no_comparison(tmp_path: Path) -> None:
    results = ratio_sweep(tmp_path, {(4, 0): 3.65, (16, 0): 3.70})
    assert results.outcome.baseline is None
    assert "no ratio 1" in " ".join(summary.details(results))


def test_setting_with_a_failed_seed_is_not_the_best(tmp_path: Path) -> None:
    values = {(1, 1): 3.7, (1, 2): 3.7, (4, 1): 3.65, (4, 2): 3.66, (64, 1): 3.5}
    error = {"type": "NotFiniteError", "text": "the loss is nan"}
    write_job(tmp_path / "x", {"loraplus.ratio": 64, "seed": 2}, None, status="failed", error=error)
    results = ratio_sweep(tmp_path, values)
    assert results.outcome.best is not None
    assert results.outcome.best.values == {"loraplus.ratio": 4}
    assert "ratio 64 has a better mean (3.5000) but 1 failed job" in " ".join(summary.details(results))


@pytest.mark.parametrize("greater", [False, True])
def test_setting_with_a_seed_whose_metric_is_not_a_number_is_not_the_best(tmp_path: Path, greater: bool) -> None:
    """The job is `ok`, but the metric of its collapsed model is NaN. The other seed alone is the lucky one."""
    values = {(1, 1): 0.6, (1, 2): 0.6, (4, 1): 0.5, (4, 2): 0.5}
    write_job(tmp_path / "x", {"loraplus.ratio": 64, "seed": 2}, None, greater_is_better=greater)
    results = ratio_sweep(tmp_path, values | {(64, 1): 0.9 if greater else 0.1}, greater_is_better=greater)
    assert results.outcome.best is not None
    assert results.outcome.best.values == {"loraplus.ratio": 1 if greater else 4}
    assert "ratio 64 has a better mean" in " ".join(summary.details(results))


@pytest.mark.parametrize(("best", "status"), [(64, None), (64, "interrupted"), (64, "waiting"), (1, "interrupted")])
def test_setting_with_fewer_seeds_than_another_is_not_the_best(tmp_path: Path, best: int, status: str | None) -> None:
    """The other seeds were not begun, or not finished. The only seed may be the lucky one."""
    other = 65 - best
    values = {(4, 1): 3.65, (4, 2): 3.66, (4, 3): 3.67, (other, 1): 3.7, (other, 2): 3.7, (other, 3): 3.7}
    for seed in (2, 3) if status else ():
        write_job(tmp_path / f"x{seed}", {"loraplus.ratio": best, "seed": seed}, None, status=str(status))
    results = ratio_sweep(tmp_path, values | {(best, 1): 3.5})
    assert results.outcome.best is not None
    assert results.outcome.best.values == {"loraplus.ratio": 4}
    told = " ".join(summary.details(results))
    assert f"ratio {best} has a better mean (3.5000) but only 1 of 3 seeds, so it isn't chosen as the best" in told
    # Without all seeds of plain LoRA, LoRA+ is compared with nothing
    assert ("This is better than the best at ratio 1 (plain LoRA) (3.7000" in told) == (best != 1)
    assert ("No setting at ratio 1 has a result for each of its seeds" in told) == (best == 1)


def test_worse_setting_with_fewer_seeds_is_still_compared(tmp_path: Path) -> None:
    results = ratio_sweep(tmp_path, {(4, 1): 3.65, (4, 2): 3.67, (1, 1): 3.7})
    assert results.outcome.passed_over is None
    assert results.outcome.against_baseline is not None
    assert results.outcome.against_baseline.gain == pytest.approx(3.7 - 3.66)


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    """The second time with another logging interval, so in another folder. Two seeds are no sample of four."""
    values = {(1, 1): 3.70, (1, 2): 3.73, (4, 1): 3.66, (4, 2): 3.69}
    for (ratio, seed), value in values.items():
        again = {"loraplus.ratio": ratio, "seed": seed, "trainer.logging_steps": 7}
        write_job(tmp_path / f"{ratio}_{seed}_b", again, value)
    results = ratio_sweep(tmp_path, values)
    assert {one.values["loraplus.ratio"]: one.spread for one in results.settings} == pytest.approx(
        {1: statistics.stdev([3.70, 3.73]), 4: statistics.stdev([3.66, 3.69])}
    )
    assert results.outcome.against_baseline is not None
    assert results.outcome.against_baseline.verdict == UNCLEAR
    assert "over 2 seeds" in summary.headline(results)


def test_speed_counts_evaluations_that_reach_the_target(tmp_path: Path) -> None:
    slow = [(0, 5.0), (10, 4.5), (20, 4.2), (30, 4.1), (40, 4.0)]
    fast = [(0, 5.0), (10, 4.2), (20, 3.9), (30, 3.8), (40, 3.7)]
    never = [(0, 5.0), (10, 4.8), (20, 4.6), (30, 4.4), (40, 4.2)]
    for ratio, curve in ((1, slow), (4, fast), (16, never)):
        write_job(tmp_path / str(ratio), {"loraplus.ratio": ratio}, curve[-1][1], curve=curve)
    outcome = results_of(tmp_path).outcome
    assert outcome.target == 4.0
    steps = {one.setting.values["loraplus.ratio"]: (one.step, one.times_fewer_steps) for one in outcome.reached}
    assert steps == {1: (40, 1.0), 4: (20, 2.0), 16: (None, None)}
    clock = next(one for one in outcome.reached if one.step == 20)
    assert clock.times_faster == pytest.approx((40 * 0.1 + 0.5) / (20 * 0.1 + 0.5))


@pytest.mark.parametrize(
    ("heights", "pace", "sentence"),
    [
        ((5.0, 4.2, 4.0, 3.9, 3.7), 0.1, "in 2x fewer steps (1.8x faster in time): by step 20 instead of 40."),
        ((5.0, 4.2, 4.0, 3.9, 3.7), 0.5, "in 2x fewer steps (2.3x slower in time): by step 20 instead of 40."),
        ((5.0, 4.2, 4.0, 3.9, 3.7), 0.2, "in 2x fewer steps (as fast in time): by step 20 instead of 40."),
        ((5.0, 4.5, 4.2, 4.1, 3.9), 0.2, "no sooner than ratio 1: by step 40."),
        ((5.0, 4.5, 4.2, 4.1, 3.9), 0.01, "no sooner than ratio 1: by step 40."),
    ],
)
def test_clock_is_reported_unless_steps_are_equal(
    tmp_path: Path, heights: tuple[float, ...], pace: float, sentence: str
) -> None:
    for ratio, curve, its_pace in ((1, (5.0, 4.5, 4.2, 4.1, 4.0), 0.1), (4, heights, pace)):
        points = list(zip((0, 10, 20, 30, 40), curve, strict=True))
        write_job(tmp_path / str(ratio), {"loraplus.ratio": ratio}, curve[-1], curve=points, pace=its_pace)
    assert sentence in summary.speed_sentence(results_of(tmp_path))


def test_best_that_favours_lora_a_and_plain_lora_among_the_good_are_said(tmp_path: Path) -> None:
    for number, (rate_a, rate_b, loss) in enumerate(((1e-3, 1e-3, 3.001), (1e-3, 2.5e-4, 3.0), (1e-3, 4e-3, 4.0))):
        write_job(tmp_path / str(number), {"loraplus.lr_A": rate_a, "loraplus.lr_B": rate_b}, loss)
    said = " ".join(summary.details(results_of(tmp_path)))
    assert "5% of the sweep's range), the best of plain LoRA among them." in said
    assert "The best setting's ratio is 0.25: lora_A trains faster than lora_B, the opposite of LoRA+." in said


def test_later_than_ratio_1_is_more_steps(tmp_path: Path) -> None:
    for ratio, curve in ((1, (5.0, 4.0, 4.1, 4.0)), (4, (5.0, 4.4, 3.9, 3.8))):
        points = list(zip((0, 10, 20, 30), curve, strict=True))
        write_job(tmp_path / str(ratio), {"loraplus.ratio": ratio}, curve[-1], curve=points)
    assert "in 2x more steps (1.7x slower in time)" in summary.speed_sentence(results_of(tmp_path))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0, 10), st.booleans())
def test_reaching_is_the_first_evaluation_as_good(heights: list[float], target: float, greater: bool) -> None:
    curve = [Point(step, height) for step, height in enumerate(heights)]
    good = [p.step for p in curve[1:] if (p.value >= target if greater else p.value <= target)]
    found = first_reaching(curve, target, -1 if greater else 1)
    assert (found.step if found else None) == (min(good) if good else None)
