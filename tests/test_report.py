"""What a sweep's report says, against numbers worked out by hand and by other libraries."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.errors import UserError
from loraplus_hydra.report import sentences
from loraplus_hydra.report.collect import Point, collect
from loraplus_hydra.report.compare import CLEAR, NOISE, ONE_SEED, UNCLEAR, first_reaching, welch
from loraplus_hydra.report.figures.style import robust_limits
from loraplus_hydra.report.keys import varied_keys
from loraplus_hydra.report.results_of import SweepResults, results_of
from loraplus_hydra.report.sweep import write_report
from loraplus_hydra.report.table import csv_text
from loraplus_hydra.report.wording import names, short
from tests.conftest import Finished
from tests.finished_sweeps import write_job, write_sweep

_RESUMED = "optimizer=adam ++loraplus.ratio=4"
Values = dict[Any, float]  # (ratio, seed) -> metric


def ratio_sweep(folder: Path, values: Values, **job: Any) -> SweepResults:
    for (ratio, seed), value in values.items():
        write_job(folder / f"{ratio}_{seed}", {"loraplus.ratio": ratio, "seed": seed}, value, **job)
    return results_of(folder)


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
    ("plain", "loraplus", "verdict", "said"),
    [
        ((3.70,), (3.60,), ONE_SEED, "nothing can be said about noise"),
        ((3.70, 3.60, 3.80), (3.69, 3.61, 3.77), NOISE, "Noise explains it"),
        ((3.70, 3.73), (3.66, 3.69), UNCLEAR, "It may be noise"),
        ((3.70, 3.71, 3.72), (3.60, 3.61, 3.62), CLEAR, "More than the seeds' noise"),
    ],
)
def test_noise_is_called_noise(
    tmp_path: Path, plain: tuple[float, ...], loraplus: tuple[float, ...], verdict: str, said: str
) -> None:
    values = {(1, seed): value for seed, value in enumerate(plain)}
    values |= {(4, seed): value for seed, value in enumerate(loraplus)}
    results = ratio_sweep(tmp_path, values)
    gap = results.outcome.against_baseline
    assert gap is not None
    assert gap.verdict == verdict
    assert gap.wins == sum(mine < theirs for mine, theirs in zip(loraplus, plain, strict=True))
    assert said in " ".join(sentences.details(results))


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=6),
    st.lists(st.floats(-5, 5), min_size=2, max_size=6),
)
@settings(max_examples=60, deadline=None)
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


def test_plain_lora_that_wins_is_said_to_win(tmp_path: Path) -> None:
    results = ratio_sweep(tmp_path, {(1, 0): 3.60, (4, 0): 3.65, (16, 0): 3.70})
    assert results.outcome.best is results.outcome.baseline
    told = " ".join(sentences.details(results))
    assert "Plain LoRA does best here" in told
    assert "by 0.0500" in told
    assert sentences.speed_sentence(results) == ""


def test_sweep_without_ratio_1_says_that_it_has_no_comparison(tmp_path: Path) -> None:
    results = ratio_sweep(tmp_path, {(4, 0): 3.65, (16, 0): 3.70})
    assert results.outcome.baseline is None
    assert "no ratio 1" in " ".join(sentences.details(results))


def test_setting_with_a_failed_seed_is_not_the_best(tmp_path: Path) -> None:
    values = {(1, 1): 3.7, (1, 2): 3.7, (4, 1): 3.65, (4, 2): 3.66, (64, 1): 3.5}
    error = {"type": "NotFiniteError", "text": "the loss is nan"}
    write_job(tmp_path / "x", {"loraplus.ratio": 64, "seed": 2}, None, status="failed", error=error)
    results = ratio_sweep(tmp_path, values)
    assert results.outcome.best is not None
    assert results.outcome.best.values == {"loraplus.ratio": 4}
    assert "ratio 64 has a better mean (3.5000) but 1 failed job" in " ".join(sentences.details(results))


def test_speed_counts_evaluations_that_truly_get_there(tmp_path: Path) -> None:
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
    ("heights", "pace", "said"),
    [
        ((5.0, 4.2, 4.0, 3.9, 3.7), 0.1, "in 2x fewer steps (1.8x faster by the clock): by step 20 instead of 40."),
        ((5.0, 4.2, 4.0, 3.9, 3.7), 0.5, "in 2x fewer steps (2.3x slower by the clock): by step 20 instead of 40."),
        ((5.0, 4.2, 4.0, 3.9, 3.7), 0.2, "in 2x fewer steps (as fast by the clock): by step 20 instead of 40."),
        ((5.0, 4.5, 4.2, 4.1, 3.9), 0.2, "in as many steps: by step 40 instead of 40."),
        ((5.0, 4.5, 4.2, 4.1, 3.9), 0.01, "in as many steps: by step 40 instead of 40."),
    ],
)
def test_clock_is_told_as_it_is_and_not_at_equal_steps(
    tmp_path: Path, heights: tuple[float, ...], pace: float, said: str
) -> None:
    for ratio, curve, its_pace in ((1, (5.0, 4.5, 4.2, 4.1, 4.0), 0.1), (4, heights, pace)):
        points = list(zip((0, 10, 20, 30, 40), curve, strict=True))
        write_job(tmp_path / str(ratio), {"loraplus.ratio": ratio}, curve[-1], curve=points, pace=its_pace)
    assert said in sentences.speed_sentence(results_of(tmp_path))


def test_later_than_ratio_1_is_more_steps(tmp_path: Path) -> None:
    for ratio, curve in ((1, (5.0, 4.0, 4.1, 4.0)), (4, (5.0, 4.4, 3.9, 3.8))):
        points = list(zip((0, 10, 20, 30), curve, strict=True))
        write_job(tmp_path / str(ratio), {"loraplus.ratio": ratio}, curve[-1], curve=points)
    assert "in 2x more steps (1.7x slower by the clock)" in sentences.speed_sentence(results_of(tmp_path))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0, 10), st.booleans())
def test_reaching_is_the_first_evaluation_as_good(heights: list[float], target: float, greater: bool) -> None:
    curve = [Point(step, height) for step, height in enumerate(heights)]
    good = [p.step for p in curve[1:] if (p.value >= target if greater else p.value <= target)]
    found = first_reaching(curve, target, greater_is_better=greater)
    assert (found.step if found else None) == (min(good) if good else None)


def test_keys_that_follow_a_swept_one_are_not_varied_keys(tmp_path: Path) -> None:
    """The ratio stands in rules too, and data.seed follows seed: neither is a key of its own."""
    results = ratio_sweep(tmp_path, {(ratio, seed): 3.7 for ratio in (1, 4) for seed in (1, 2)})
    assert results.keys == ("loraplus.ratio", "seed")


def test_keys_of_folders_without_overrides_are_found_in_their_configs(tmp_path: Path) -> None:
    ratio_sweep(tmp_path, {(ratio, seed): 3.7 for ratio in (1, 4) for seed in (1, 2)})
    for folder in tmp_path.iterdir():
        (folder / ".hydra" / "overrides.yaml").unlink()
    assert varied_keys(collect(tmp_path)) == ("loraplus.ratio", "seed")


def test_option_of_a_group_is_one_key_whatever_it_changes(tmp_path: Path) -> None:
    for place, (option, lr) in enumerate((("adamw", 5e-5), ("lion", 1e-5))):
        folder = write_job(tmp_path / str(place), {"optimizer.lr": lr, "optimizer.x": option}, 3.7)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- optimizer={option}\n")
    assert varied_keys(collect(tmp_path)) == ("optimizer",)


UNTRAINED: dict[str, Any] = {
    "trainer.resume_from_checkpoint": "auto",
    "trainer.save_steps": 7,
    "trainer.logging_steps": 3,
    "task.samples": 2,
    "logger.folder": "here",
}


def test_what_changes_nothing_of_what_is_trained_is_compared_only_where_it_was_swept(tmp_path: Path) -> None:
    write_job(tmp_path / "0", {"loraplus.ratio": 1}, 3.7)
    write_job(tmp_path / "1", {"loraplus.ratio": 4, **UNTRAINED}, 3.6)
    assert varied_keys(collect(tmp_path)) == ("loraplus.ratio",)
    (tmp_path / "1" / ".hydra" / "overrides.yaml").unlink()
    assert varied_keys(collect(tmp_path)) == ("loraplus.ratio",)
    write_sweep(tmp_path, swept=["trainer.save_steps"])
    assert varied_keys(collect(tmp_path)) == ("trainer.save_steps", "loraplus.ratio")


def test_figures_have_room_for_runs_that_differ_in_many_keys(tmp_path: Path) -> None:
    """No label is cut off, and none of the axes' heads runs into the next."""
    import warnings

    from loraplus_hydra.report import figures
    from loraplus_hydra.report.figures.style import house_style

    for place in range(6):
        job = {
            "loraplus.ratio": (1, 4, 16)[place % 3],
            "optimizer.lr": (5e-5, 1e-4)[place % 2],
            "adapter.r": (4, 8)[place // 3],
            "model.path": f"/home/somebody/models/with/long/names/{place % 4}/llama-3-tiny",
            "data.train": f"/data/a/folder/with/a/long/name/rows-{(place + 1) % 4}.jsonl",
            "trainer.max_steps": 100 + place % 5,
            "trainer.per_device_train_batch_size": 8 + (place + 2) % 5,
            "trainer.gradient_accumulation_steps": 1 + (place + 1) % 3,
        }
        write_job(tmp_path / str(place), job, 3.5 + 0.01 * place)
    results = results_of(tmp_path)
    assert len(results.compared) >= 7
    with house_style(), warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {picture.name: picture.figure for picture in figures.draw_all(results)}
        for figure in drawn.values():
            figure.canvas.draw()
    assert set(drawn) >= {"settings", "curves", "keys"}
    texts = [*drawn["settings"].axes[0].get_yticklabels(), *drawn["curves"].legends[0].get_texts()]
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text.get_text()
        assert box.x1 <= text.figure.bbox.width, text.get_text()
    heads = [text.get_window_extent() for text in drawn["keys"].axes[0].texts if text.get_fontweight() == "bold"]
    assert len(heads) == len(results.compared) + 1
    assert all(one.x1 <= other.x0 for one, other in pairwise(heads))


def test_job_that_failed_before_its_config_was_written_has_its_values(tmp_path: Path) -> None:
    ratio_sweep(tmp_path, {(1, 0): 3.7, (4, 0): 3.6})
    bad = tmp_path / "bad"
    (bad / ".hydra").mkdir(parents=True)
    (bad / ".hydra" / "config.yaml").write_text("seed: 0\nmodel: {lr: 1e-4}\noptimizer: {lr: '${..model.lr}'}\n")
    (bad / ".hydra" / "overrides.yaml").write_text("- loraplus.ratio=-3\n- seed=0\n")
    (bad / "result.json").write_text(json.dumps({"status": "failed", "error": {"type": "ConfigErrors", "text": "no"}}))
    job = next(job for job in collect(tmp_path).jobs if job.folder == "bad")
    assert job.config["optimizer.lr"] == 1e-4
    row = next(row for row in csv_rows(write_report(tmp_path).folder) if row["folder"] == "bad")
    assert row["loraplus.ratio"] == "-3"
    assert row["error"] == "ConfigErrors: no"


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_a_job_the_best_first(tmp_path: Path) -> None:
    values = {(1, 1): 3.7, (4, 1): 3.6, (16, 1): 3.65}
    ratio_sweep(tmp_path, values)
    write_report(tmp_path)
    rows = csv_rows(tmp_path)
    assert list(rows[0]) == [
        *("folder", "status", "loraplus.ratio", "eval_loss", "best", "steps", "seconds", "error"),
    ]
    assert [float(row["eval_loss"]) for row in rows] == sorted(values.values())


KEYS = ("status", "metric", "metrics", "eval_loss", "error", "type", "seed", "lr", "step", "loss", "norms", "groupA")
BROKEN: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda folder: (folder / "result.json").write_text('{"status": "ok", "metri'),
    "list": lambda folder: (folder / "result.json").write_text("[1, 2]"),
    "junk": lambda folder: (folder / "result.json").write_bytes(bytes(range(128, 256))),
    "deep": lambda folder: (folder / "result.json").write_text("[" * 100_000),
    "no_result": lambda folder: (folder / "result.json").unlink(),
    "no_status": lambda folder: (folder / "result.json").write_text("{}"),
    "odd_types": lambda folder: (folder / "result.json").write_text(
        '{"status": "ok", "metric": "eval_loss", "metrics": 7, "best": [], "steps": "x", "seconds": {}, "error": 3}'
    ),
    "huge": lambda folder: (folder / "result.json").write_text(
        f'{{"status": "ok", "metric": "eval_loss", "metrics": {{"eval_loss": 1{"0" * 400}}}}}'
    ),
    "no_config": lambda folder: (folder / "config.yaml").unlink(),
    "yaml": lambda folder: (folder / "config.yaml").write_text("a: [1, {"),
    "yaml_tag": lambda folder: (folder / "config.yaml").write_text("a: !!python/object/apply:os.getcwd []"),
    "no_metrics": lambda folder: (folder / "metrics.jsonl").unlink(),
    "cut_metrics": lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 4}\n[3]\n{"step": 2, "lo'),
    "groups": lambda folder: (folder / "param_groups.json").write_text('[3, {"group": [], "role": {}}, {"lr": "x"}]'),
}
WITH_A_RESULT = {
    "no_config",
    "yaml",
    "yaml_tag",
    "no_metrics",
    "cut_metrics",
    "groups",
}  # what is broken there is not the result


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@given(result=ANY_JSON, config=ANY_JSON, groups=ANY_JSON, lines=st.lists(ANY_JSON, max_size=3), overrides=ANY_JSON)
@settings(max_examples=50, deadline=None)
def test_whatever_the_files_hold_the_sweep_is_read_and_compared(
    tmp_path_factory: pytest.TempPathFactory, result: Any, config: Any, groups: Any, lines: list[Any], overrides: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "0" / ".hydra").mkdir(parents=True)
    (folder / "0" / "result.json").write_text(json.dumps(result))
    (folder / "0" / "config.yaml").write_text(json.dumps(config))
    (folder / "0" / "param_groups.json").write_text(json.dumps(groups))
    (folder / "0" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "0" / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    write_job(folder / "1", {"loraplus.ratio": 4}, 3.6)
    results = results_of(folder)
    assert [job.folder for job in results.sweep.jobs] == ["0", "1"]
    assert results.outcome.best is not None
    assert csv_text(results).count("\n") >= 3


def test_two_hundred_jobs_some_of_them_broken(tmp_path: Path) -> None:
    ratios, rates = (1, 2, 4, 8, 16), (1e-5, 5e-5, 2e-4, 1e-3)
    jobs = [(ratio, lr, seed) for ratio in ratios for lr in rates for seed in range(10)]
    assert len(jobs) == 200
    for place, (ratio, lr, seed) in enumerate(jobs):
        value = 3.6 + 0.1 * abs(math.log(lr * ratio / 1e-3)) + 0.01 * seed
        write_job(tmp_path / f"{place:03}", {"loraplus.ratio": ratio, "optimizer.lr": lr, "seed": seed}, value)
    for place, (name, damage) in enumerate(BROKEN.items()):
        (tmp_path / f"{place * 13:03}").rename(tmp_path / name)
        damage(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    report = write_report(tmp_path)
    assert len(report.results.sweep.jobs) == 200
    assert {job.folder for job in report.unsuccessful} == set(BROKEN) - WITH_A_RESULT
    assert all(job.reason for job in report.unsuccessful)
    assert report.results.sweep.not_jobs == ("empty",)
    page = (tmp_path / "report.html").read_text()
    assert all(f"<b>{name}</b>" in page for name in set(BROKEN) - WITH_A_RESULT)
    rows = csv_rows(tmp_path)
    assert len(rows) == 200
    assert {row["folder"] for row in rows if row["status"] == "broken"} >= {"truncated", "list", "junk", "deep"}
    assert set(report.files) >= {"report.html", "results.csv", "ratio.png", "heatmap.png", "curves.png"}
    assert not list(tmp_path.glob(".*.unfinished"))


def test_one_job_and_no_success_make_a_page_too(tmp_path: Path) -> None:
    write_job(tmp_path / "one" / "0", {"loraplus.ratio": 4}, 3.7)
    assert "The one setting has eval_loss 3.7000" in (write_report(tmp_path / "one").folder / "report.html").read_text()
    error = {"type": "ValueError", "text": "bad"}
    for place in range(3):
        job = {"loraplus.ratio": place + 1}
        write_job(tmp_path / "none" / str(place), job, None, status="failed", error=error)
    report = write_report(tmp_path / "none")
    assert len(report.unsuccessful) == 3
    assert "No job has a result" in (tmp_path / "none" / "report.html").read_text()


def test_figures_that_no_longer_suit_are_taken_away(tmp_path: Path) -> None:
    ratio_sweep(tmp_path, {(1, 0): 3.7, (4, 0): 3.6})
    write_report(tmp_path)
    assert (tmp_path / "ratio.png").exists()
    for name in ("1_0", "4_0"):
        (tmp_path / name / "result.json").write_text("{}")
    write_report(tmp_path)
    assert not (tmp_path / "ratio.png").exists()


def test_texts_of_jobs_are_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $x_{$ [bold]"
    error = {"type": "ValueError", "text": evil}
    write_sweep(tmp_path, name=evil, command=evil, swept=["adapter.name"])
    for place, value in enumerate((3.6, 3.7)):
        write_job(tmp_path / f"<img src=x>{place}", {"adapter.name": f"<b>{place} $\\frac"}, value)
    write_job(tmp_path / "<script>", {"adapter.name": evil}, None, status="failed", error=error)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "<img" not in page
    assert "<b>0 $" not in page


def test_diverged_value_leaves_the_scale_to_the_others() -> None:
    low, high, beyond = robust_limits([3.6, 3.61, 3.65, 3.7, 3.8, 3.72, 3.66, 3.9, 3.63, 3.64, 4e7])
    assert (low, high, beyond) == (3.6, 3.9, 1)
    assert robust_limits([1.0, 1.0, 1.0]) == (1.0, 1.0, 0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_scale_lies_within_the_values(values: list[float]) -> None:
    low, high, beyond = robust_limits(values)
    assert low in values
    assert high in values
    assert beyond == sum(not low <= value <= high for value in values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0008, "8e-4"), (5e-05, "5e-5"), (16.0, "16"), (0.0125, "0.0125"), (1.6e-3, "1.6e-3"), (True, "true"), (0, "0")],
)
def test_numbers_are_short(value: Any, text: str) -> None:
    assert short(value) == text


def test_short_names_stay_apart() -> None:
    assert names(["optimizer.lr", "model.lr", "loraplus.ratio", "seed"]) == {
        "optimizer.lr": "optimizer.lr",
        "model.lr": "model.lr",
        "loraplus.ratio": "ratio",
        "seed": "seed",
    }


def test_folder_without_jobs_is_told(tmp_path: Path, cli: Callable[..., Finished]) -> None:
    with pytest.raises(UserError, match="holds no job"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        write_report(tmp_path / "gone")
    finished = cli("report", str(tmp_path / "gone"))
    assert finished.status == 1
    assert "there is no folder" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_report_command_shows_table_failures_and_command(tmp_path: Path, cli: Callable[..., Finished]) -> None:
    ratio_sweep(tmp_path / "sweep", {(1, 1): 3.7, (1, 2): 3.72, (4, 1): 3.6, (4, 2): 3.62})
    error = {"type": "NotFiniteError", "text": "the loss is [nan] at step 3"}
    job = {"loraplus.ratio": 64, "seed": 1, "data.x": "it's a file"}
    write_job(tmp_path / "sweep" / "bad", job, None, status="failed", error=error)
    finished = cli("report", str(tmp_path / "sweep"))
    assert finished.status == 0
    assert "eval_loss, lower is better, mean ± standard deviation\n" in finished.out
    assert "Without a result\n" in finished.out
    assert "3.6100 ± 0.0141" in finished.out
    assert "NotFiniteError: the loss is [nan] at step 3" in finished.out
    assert "python -m loraplus_hydra loraplus.ratio=4 seed=1" in finished.out
    assert (tmp_path / "sweep" / "report.html").exists()


def test_job_of_a_ready_sweep_is_run_alone(tmp_path: Path) -> None:
    folder = write_job(tmp_path / "0", {"loraplus.ratio": 4}, 3.5)
    (folder / ".hydra" / "overrides.yaml").write_text("- hparams_search=ratio\n- loraplus.ratio=4\n")
    command = sentences.command(results_of(tmp_path))
    assert command == "python -m loraplus_hydra hparams_search=ratio loraplus.ratio=4 hydra.mode=RUN"


def test_command_of_the_best_job_is_quoted_for_a_shell(tmp_path: Path) -> None:
    import shlex

    write_job(tmp_path / "0", {"data.train": "it's a file.jsonl", "loraplus.ratio": 4}, 3.5)
    command = sentences.command(results_of(tmp_path))
    assert shlex.split(command) == [
        "python",
        "-m",
        "loraplus_hydra",
        "data.train=it's a file.jsonl",
        "loraplus.ratio=4",
    ]


def test_command_of_a_resumed_job_composes_to_that_jobs_config(
    tmp_path: Path, tiny_run: list[str], cli: Callable[..., Finished], compose: Callable[..., Any]
) -> None:
    import shlex

    from loraplus_hydra.results import run_hash

    run = tmp_path / "runs" / "a"
    words = [*tiny_run, "task.samples=0", "trainer.save_steps=2", "trainer.max_steps=2"]
    assert cli(*words, f"hydra.run.dir={run}").status == 0
    for changes in (
        ["trainer.max_steps=3", "loraplus.ratio=2"],
        ["trainer.max_steps=4", "optimizer.lr=2e-3", "+trainer.label_smoothing_factor=0.0"],
    ):
        assert cli("resume", str(run), *changes).status == 0
        command = shlex.split(sentences.command(results_of(tmp_path / "runs")))
        assert command[:3] == ["python", "-m", "loraplus_hydra"]
        stored = OmegaConf.load(run / "config.yaml")
        assert isinstance(stored, DictConfig)
        assert run_hash(compose(*command[3:])) == run_hash(stored)


@pytest.mark.parametrize(
    ("resumes", "said"),
    [
        ([["run=here", "++loraplus.ratio=4"]], _RESUMED),
        ([["++loraplus.ratio=16"], ["run=here", "++loraplus.ratio=4"]], _RESUMED),
        ([["++loraplus.ratio=4", "++trainer.max_steps=7"], ["+trainer.new=x"]], None),  # nothing tells of new: x
        ([["++loraplus.ratio=4", "++trainer.max_steps=7"]], _RESUMED),
        ([["trust_remote_code=true", "++trainer.resume_from_checkpoint=x", "++loraplus.ratio=4"]], _RESUMED),
        ([["++loraplus.ratio=16"]], None),  # the config has neither this nor what it began with
    ],
)
def test_changes_of_resumes_count_where_the_config_has_them(
    tmp_path: Path, resumes: list[list[str]], said: str | None
) -> None:
    """A job that began with ratio 2 and whose config has 4; a resume may have been refused."""
    folder = write_job(tmp_path / "0", {"loraplus.ratio": 4}, 3.5, resumes=resumes)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(["loraplus.ratio=2", "optimizer=adam"]))
    begun = OmegaConf.load(folder / "config.yaml")
    begun.loraplus.ratio = 2
    OmegaConf.save(begun, folder / ".hydra" / "config.yaml")
    assert sentences.command(results_of(tmp_path)) == (f"python -m loraplus_hydra {said}" if said else "")


def test_status_that_no_job_of_ours_has_is_known(tmp_path: Path) -> None:
    write_job(tmp_path / "0", {"loraplus.ratio": 4}, None, status="pruned")
    (job,) = collect(tmp_path).jobs
    assert (job.status, job.reason) == ("pruned", "ended early by a search")
