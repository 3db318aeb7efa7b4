"""The study: which runs are missing from a log, the log itself, and tables with numbers that were counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from benchmarks import claims, claims_tables
from benchmarks.claims_log import Grid, Setting, append, read_grids, read_log
from benchmarks.claims_pictures import write_pictures
from benchmarks.claims_tables import (
    best_table,
    claims_table,
    nearest,
    reached,
    regret_table,
    speed_table,
    tables,
    uniform_table,
    with_tables,
)

ROOT = Path(__file__).resolve().parents[2]
STUDY = OmegaConf.load(ROOT / "benchmarks" / "claims.yaml")
# (rate, ratio) -> final losses with seeds 0, 1, ...; None = diverged. Before training the loss is 5.
LOSSES: dict[tuple[float, float], list[float | None]] = {
    (1e-3, 1): [3.5],
    (2e-3, 1): [3.0, 3.1],
    (4e-3, 1): [3.2, 3.3],
    (8e-3, 1): [4.95],
    (1e-3, 4): [2.9, 3.0],
    (2e-3, 4): [2.8, 3.0],
    (4e-3, 4): [3.64],
    (8e-3, 4): [None],
}


def line(loss: float | None, lr: float = 1e-3, ratio: float = 1, seed: int = 0, **other: Any) -> dict[str, Any]:
    """A line of the log: 100 steps with evaluations at 0, 50 and 100, where half of the gain is made by step 50."""
    metrics = {} if loss is None else {"eval_loss": loss}
    curve = [[0, 5.0]] if loss is None else [[0, 5.0], [50, (5 + loss) / 2], [100, loss]]
    return {
        "lr": lr,
        "ratio": ratio,
        "seed": seed,
        "status": "failed" if loss is None else "ok",
        "metrics": metrics,
        "metrics_before": {"eval_loss": 5.0},
        "curve": curve,
        "steps": 100,
        "cpu_seconds": 90.0,
        "peak_memory_bytes": 2**30 if ratio == 1 else 2**30 + 2**24,
        "eval_rows": "rows",
        "processor": "a processor",
        "versions": {"python": "3.11", "torch": "2.13", "loraplus_hydra": "0.2"},
        "overrides": ["a=1", "b=2"],
    } | other


def grid(losses: dict[tuple[float, float], list[float | None]] = LOSSES, **other: Any) -> Grid:
    settings = {
        "overrides": ["a=1", "b=2"],
        "best": 2,
        "greater_is_better": False,
        "metric": "eval_loss",
        "title": "one grid",
    } | other
    runs = {
        Setting(lr, ratio, seed): line(loss, lr, ratio, seed)
        for (lr, ratio), values in losses.items()
        for seed, loss in enumerate(values)
    }
    return Grid("one", rates=[1e-3, 2e-3, 4e-3, 8e-3], ratios=[1, 4], seeds=[0, 1], runs=runs, **settings)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def test_first_the_grid_then_the_best_rates_of_finished_ratios() -> None:
    some = {key: values[:1] for key, values in LOSSES.items() if key != (8e-3, 4)}
    missing = grid(some).missing()
    # Ratio 4 lacks a rate, so its best rates aren't known yet
    assert missing == [Setting(8e-3, 4, 0), Setting(2e-3, 1, 1), Setting(4e-3, 1, 1)]
    one_more = {**some, (8e-3, 4): [None]}
    assert grid(one_more).missing()[2:] == [Setting(2e-3, 4, 1), Setting(1e-3, 4, 1)]
    assert grid().missing() == []
    assert grid({}).missing() == [Setting(lr, ratio, 0) for ratio in (1, 4) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    assert grid().total == 8 + 4


def test_best_rates_of_an_accuracy_are_the_highest() -> None:
    found = grid({key: values[:1] for key, values in LOSSES.items()}, greater_is_better=True).missing()
    assert found == [Setting(8e-3, 1, 1), Setting(1e-3, 1, 1), Setting(4e-3, 4, 1), Setting(1e-3, 4, 1)]


def test_log_without_its_last_half_line_is_read_and_continued(tmp_path: Path) -> None:
    log = tmp_path / "results" / "claims.jsonl"
    assert read_log(log) == []
    append(log, {"lr": 1})
    append(log, {"lr": 2})
    assert log.read_text() == '{"lr": 1}\n{"lr": 2}\n'
    log.write_text(log.read_text()[:-4])  # killed while it wrote the second line
    assert read_log(log) == [{"lr": 1}]
    append(log, {"lr": 3})
    assert read_log(log) == [{"lr": 1}, {"lr": 3}]


def test_lines_belong_to_the_grid_with_the_same_overrides() -> None:
    embedded, *others = read_grids(STUDY, [])
    overrides = list(embedded.overrides)
    found = read_grids(STUDY, [line(3.0, overrides=overrides), line(3.0, lr=2e-3, overrides=[*overrides, "x=1"])])
    assert list(found[0].runs) == [Setting(1e-3, 1, 0)]
    assert all(not one.runs for one in found[1:])
    assert [one.total for one in (embedded, *others)] == [72, 30, 8, 48, 24]
    # No path of a machine is in the log
    assert "data.train=${banking77}/train.csv" in others[0].overrides


def test_started_again_only_missing_runs_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[list[str]] = []

    def train(words: list[str], threads: int) -> dict[str, Any]:
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(words)
        return {key: value for key, value in line(3.0).items() if key not in ("lr", "ratio", "seed", "overrides")}

    monkeypatch.setattr(claims, "train", train)
    config = OmegaConf.merge(STUDY, {"out": str(tmp_path / "log.jsonl"), "banking77": "rows", "parts": ["minilm"]})
    with pytest.raises(KeyboardInterrupt):
        claims.train_missing(config)
    first, trained[:] = [*trained], []
    with pytest.raises(KeyboardInterrupt):
        claims.train_missing(config)
    rates = [words[-3] for words in first + trained]
    assert rates == [f"optimizer.lr={lr}" for lr in [*STUDY.grids.minilm.rates, *STUDY.grids.minilm.rates[:2]]]
    assert f"data.train={Path('rows').resolve()}/train.csv" in first[0]
    assert len(read_log(tmp_path / "log.jsonl")) == 8
    claims.train_missing(OmegaConf.merge(config, {"minutes": -1}))  # the time is over


def test_line_of_a_run(tmp_path: Path) -> None:
    result = dict.fromkeys(claims._KEPT, 1) | {"metric": "eval_loss", "inputs": {"data.eval": "abc"}}
    (tmp_path / "result.json").write_text(json.dumps(result | {"error": {"type": "NotFiniteError", "text": "nan"}}))
    lines = [{"step": 0, "eval_loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 10, "eval_loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    kept = claims.line_of(tmp_path)
    assert kept["curve"] == [(0, 5.0), (10, 3.0)]
    assert kept["eval_rows"] == "abc"
    assert claims._has_diverged(tmp_path)


def test_best_against_best_is_counted_by_hand() -> None:
    plain, plus = cells(best_table(grid()))
    assert plain == ["1 (plain LoRA)", "2e-3", "4 of 4", "3.0500 ± 0.0707", "2", "-"]
    # The mean at 2e-3 is 2.9, at 1e-3 2.95; the differences of the seeds are -0.2 and -0.1
    assert plus == ["4", "2e-3", "4 of 4", "2.9000 ± 0.1414", "2", "-0.1500 ± 0.0707"]


def test_a_best_rate_at_the_edge_of_the_grid_is_marked() -> None:
    some = grid({(1e-3, 1): [3.0], (2e-3, 1): [3.1]})
    assert cells(best_table(some)) == [["1 (plain LoRA)", "1e-3 (edge)", "2 of 4", "3.0000", "1", "-"]]


def test_regret_is_relative_to_the_best_rate_of_the_first_seed() -> None:
    plain, plus = cells(regret_table(grid()))
    assert plain == ["1", "2e-3", "-", "-", "+65.0%", "-"]  # 4.95 / 3.0; x 8 is beyond the grid
    assert plus == ["4", "2e-3", "-", "-", "diverged", "-"]
    assert "rate / 4" in regret_table(grid())
    low = grid({(8e-3, 1): [2.0], (1e-3, 1): [3.0], (4e-3, 1): [2.5]})
    assert cells(regret_table(low)) == [["1", "8e-3", "+50.0%", "missing", "-", "-"]]


def test_nearest_rate_of_a_grid() -> None:
    rates = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert [nearest(rates, 1.0, factor) for factor in (3, 10, 16, 32, 1 / 3)] == [4, 8, 16, None, None]
    assert nearest([2.0, 6.0, 18.0], 2.0, 3) == 6
    assert nearest([2.0, 6.0, 18.0], 2.0, 8) == 18


def test_step_that_reaches_a_value_is_interpolated() -> None:
    curve = [(0, 5.0), (50, 4.0), (100, 3.0)]
    assert reached(curve, 3.5, False) == pytest.approx(75)
    assert reached(curve, 3.0, False) == pytest.approx(100)
    assert reached(curve, 2.9, False) is None
    assert reached([(0, 0.1), (10, 0.5), (20, 0.4)], 0.3, True) == pytest.approx(5)


def test_speed_is_counted_by_hand() -> None:
    (plus,) = cells(speed_table(grid()))
    # Seed 0 falls from 3.9 at step 50 to 2.8 at 100, and is at 3.0 at step 90.9; seed 1 from 4.0 to 3.0, at 3.1 at 95
    assert plus == ["4", "2e-3", "93 ± 3", "1.08 ± 0.03 x", "2", "1.08 ± 0.03 x"]
    never = grid({(2e-3, 1): [3.0, 3.1], (2e-3, 4): [3.1, 3.1]})
    assert cells(speed_table(never))[0][2:5] == ["100", "1.00 x in 1 of 2", "2"]


def test_high_uniform_rate_is_unstable_if_it_gains_almost_nothing() -> None:
    (row,) = cells(uniform_table(grid()))
    # 2e-3 x 4 is 8e-3: a gain of 0.05 of at most 2.2
    assert row == ["4", "2e-3", "2.8000 (2e-3)", "3.0000 (2e-3)", "4.9500 (8e-3)", "yes"]
    (row,) = cells(uniform_table(grid({**LOSSES, (8e-3, 1): [4.0]})))
    assert row[-1] == "no"


def test_verdicts() -> None:
    faster, memory, uniform = cells(claims_table([grid()]))
    assert faster[3] == "not confirmed"
    assert memory[2:] == ["1.02 to 1.02 of plain LoRA's (medians of each ratio)", "confirmed"]
    assert uniform[3] == "confirmed, one seed"
    quick = grid({(2e-3, 1): [4.0], (2e-3, 4): [3.0]})
    assert cells(claims_table([quick]))[0][3] == "confirmed, one seed"  # at step 50
    assert [row[3] for row in cells(claims_table([grid({})]))] == ["not yet measured"] * 3


@pytest.mark.parametrize("other", [{"processor": "another"}, {"versions": {"loraplus_hydra": "0.3"}}])
def test_memory_of_other_processors_and_versions_is_not_compared(other: dict[str, Any]) -> None:
    some = grid()
    some.runs[Setting(2e-3, 4, 0)] |= {"peak_memory_bytes": 2**32, **other}
    assert cells(claims_table([some]))[1][2] == "1.02 to 1.02 of plain LoRA's (medians of each ratio)"
    # With a plain run beside it, 4 GiB are twice as much as 2
    some.runs[Setting(2e-3, 1, 0)] |= {"peak_memory_bytes": 2**31, **other}
    for one in some.runs.keys() - {Setting(2e-3, 1, 0), Setting(2e-3, 4, 0)}:
        del some.runs[one]
    told = "2.00 to 2.00 of plain LoRA's (medians of each ratio)"
    assert cells(claims_table([some]))[1][2:] == [told, "not confirmed"]


def test_missing_runs_are_counted() -> None:
    some = grid({key: LOSSES[key] for key in list(LOSSES)[:2]})
    text = tables([some, grid({})])
    assert "3 of 24 runs are in the log, from 0.1 hours of CPU time (a processor, Python 3.11, torch 2.13)" in text
    assert "3 of 12 runs: 2 of the 8 of the grid (seed 0), 1 with other seeds." in text
    assert "0 of 12 runs." in text
    some.runs[Setting(1e-3, 1, 0)]["eval_rows"] = "others"
    assert "must not be compared" in tables([some])


def test_picture_of_each_grid_with_runs(tmp_path: Path) -> None:
    write_pictures([grid(), grid({}, title="another")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study_one.png"]


def test_page_shows_the_tables_of_the_committed_log() -> None:
    page = (ROOT / STUDY.page).read_text(encoding="utf-8")
    text = tables(read_grids(STUDY, read_log(ROOT / STUDY.out)))
    assert page == with_tables(page, text)
    assert page.count(claims_tables._BEGIN) == 1


def test_committed_log_has_no_broken_line() -> None:
    log = ROOT / STUDY.out
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [json.loads(one) for one in lines] == read_log(log)
    kept = sum(len(one.runs) for one in read_grids(STUDY, read_log(log)))
    assert kept == len(lines)
