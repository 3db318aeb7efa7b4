"""A best value at the grid's edge: the next value, and the command that extends the sweep."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.report import summary
from loraplus_hydra.report.edges import as_text, next_value
from loraplus_hydra.report.results import SweepResults, results_of
from loraplus_hydra.report.write import write_report
from tests.conftest import Finished
from tests.support.finished_sweeps import write_job, write_sweep

STARTS = st.sampled_from([1.0, 2.0, 3.0, 5.0]).flatmap(
    lambda digit: st.integers(-7, 3).map(lambda decade: float(f"{digit:g}e{decade}"))
)


@given(STARTS, st.sampled_from([1.5, 2, 3, 4, 5, 10]), st.integers(3, 8))
def test_equal_factors_continue(start: float, factor: float, size: int) -> None:
    grid = [start * factor**place for place in range(-1, size + 1)]
    assert next_value(grid[1:-1], upper=True) == pytest.approx(grid[-1], rel=1e-9)
    assert next_value(grid[1:-1], upper=False) == pytest.approx(grid[0], rel=1e-9)


@given(STARTS, st.integers(2, 9), st.integers(3, 8))
def test_equal_differences_continue_within_the_positive_numbers(step: float, first: int, size: int) -> None:
    grid = [step * (first + place) for place in range(-1, size + 1)]
    assert next_value(grid[1:-1], upper=True) == pytest.approx(grid[-1], rel=1e-9)
    assert next_value(grid[1:-1], upper=False) == pytest.approx(grid[0], rel=1e-9)
    assert next_value([step, 2 * step, 3 * step], upper=False) is None  # 0
    assert next_value([0, step, 2 * step], upper=False) is None  # below 0


@given(
    st.sets(st.integers(1, 9), min_size=2, max_size=4),
    st.integers(-6, 2),
    st.integers(0, 3),
    st.integers(4, 9),
)
def test_digits_of_each_decade_continue(digits: set[int], decade: int, skipped: int, size: int) -> None:
    pattern = [float(f"{digit}e{decade + more}") for more in range(14) for digit in sorted(digits)]
    grid = pattern[skipped : skipped + size + 2]
    found = next_value(grid[1:-1], upper=True)
    if len(grid) - 2 > len(digits):  # otherwise the pattern is not known
        steps = {round(after - before, 12) for before, after in pairwise(grid[1:-1])}
        if len(steps) > 1:
            assert found == grid[-1]
            assert next_value(grid[1:-1], upper=False) == grid[0]


@pytest.mark.parametrize(
    ("values", "below", "above"),
    [
        ((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 3e-5, 3e-2),
        ((1e-6, 5e-6, 1e-5, 5e-5, 1e-4), 5e-7, 5e-4),
        ((1, 2, 5), 0.5, 10),
        ((1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 2e-4, 4e-4), 2e-7, 8e-4),  # the factor at the edge
        ((0, 0.001, 0.01, 0.1), None, 1),
        ((1, 4, 16), 0.25, 64),
        ((1, 2), 0.5, 4),
        ((1e-3, 4e-3), 2.5e-4, 1.6e-2),
        ((1,), None, None),
        ((-2, 1, 7), None, None),
    ],
)
def test_next_values_of_usual_grids(values: Sequence[float], below: float | None, above: float | None) -> None:
    assert (next_value(values, upper=False), next_value(values, upper=True)) == (below, above)


@given(st.floats(1e-12, 1e12))
def test_text_of_a_value_is_read_as_the_value(value: float) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"optimizer.lr={as_text(value)}").value()
    assert parsed == pytest.approx(value, rel=1e-11)


def swept(
    folder: Path, key: str, values: Mapping[Any, float], command: str, seeds: Sequence[int] = (0,), **job: Any
) -> SweepResults:
    """The results of a sweep over one key, from value to metric."""
    write_sweep(folder, name="made_up", command=command, swept=[key])
    for value, metric in values.items():
        for seed in seeds:
            write_job(folder / f"{value}_{seed}", {key: value, "seed": seed}, metric + 0.001 * seed, **job)
    return results_of(folder)


def extension(results: SweepResults) -> tuple[list[str], list[str]]:
    sentences, command = summary.extension(results)
    return sentences, shlex.split(command)[3:]


def test_best_at_the_largest_value_gives_the_same_command_with_the_next_one(tmp_path: Path) -> None:
    command = "python -m loraplus_hydra -m 'data.train=my rows.jsonl' optimizer.lr=1e-4,1e-3,1e-2 seed=0,1"
    values = {1e-4: 3.9, 1e-3: 3.7, 1e-2: 3.6}
    sentences, words = extension(swept(tmp_path, "optimizer.lr", values, command, seeds=(0, 1)))
    assert sentences == ["At the grid's edge: optimizer.lr 0.01 is the largest value. Extend to 0.1."]
    assert words == ["-m", "data.train=my rows.jsonl", "optimizer.lr=1e-4,1e-3,1e-2,0.1", "seed=0,1"]


def test_values_of_a_ready_made_sweep_are_listed_with_the_next_one(tmp_path: Path) -> None:
    command = "python -m loraplus_hydra hparams_search=ratio seed=1"
    values = {1: 3.9, 2: 3.8, 4: 3.7, 8: 3.6}
    _, words = extension(swept(tmp_path, "loraplus.ratio", values, command))
    assert words == ["hparams_search=ratio", "seed=1", "loraplus.ratio=1,2,4,8,16"]


def test_value_that_has_not_run_yet_is_no_edge(tmp_path: Path) -> None:
    command = "python -m loraplus_hydra -m optimizer.lr=1e-4,1e-3,1e-2,1e-1"
    results = swept(tmp_path, "optimizer.lr", {1e-4: 3.9, 1e-3: 3.7, 1e-2: 3.6}, command)
    assert summary.extension(results) == ([], "")


def test_sweep_without_a_known_command_has_the_sentence_alone(tmp_path: Path) -> None:
    results = swept(tmp_path, "optimizer.lr", {1e-4: 3.5, 1e-3: 3.7, 1e-2: 3.6}, "")
    sentence = "At the grid's edge: optimizer.lr 1e-4 is the smallest value. Extend to 1e-5."
    assert summary.extension(results) == ([sentence], "")


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("loraplus.ratio", {1: 3.5, 4: 3.6, 16: 3.7}, "-m loraplus.ratio=1,4,16"),  # plain LoRA
        ("optimizer.lr", {1e-4: 3.9, 1e-3: 3.7, 1e-2: 3.8}, "-m optimizer.lr=1e-4,1e-3,1e-2"),  # inside
        ("optimizer.lr", {1e-3: 3.9, 1e-2: 3.7}, "-m optimizer.lr=1e-3,1e-2"),  # two values are a comparison
        ("seed", {0: 3.9, 1: 3.7, 2: 3.6}, "-m seed=0,1,2"),
        ("adapter.r", {1: 3.5, 2: 3.6, 4: 3.7}, "-m adapter.r=1,2,4"),  # half a rank
        ("scheduler.warmup_ratio", {0.1: 3.9, 0.5: 3.7, 0.9: 3.6}, "-m scheduler.warmup_ratio=0.1,0.5,0.9"),  # above 1
        ("optimizer.lr", {1e-4: 3.9, 1e-3: 3.7, 1e-2: 3.6}, "hparams_search=optuna"),
        ("optimizer.lr", {1e-4: 3.9, 1e-3: 3.7, 1e-2: 3.6}, "hparams_search=tune"),  # before it has an answer
        ("optimizer.lr", {1e-4: 3.9, 1e-3: 3.7, 1e-2: 3.6}, "-m 'optimizer.lr=choice(1e-4,1e-3,1e-2)'"),
        ("task.metric", {"a": 3.9, "b": 3.7, "c": 3.6}, "-m task.metric=a,b,c"),
    ],
)
def test_no_extension(tmp_path: Path, key: str, values: Mapping[Any, float], words: str) -> None:
    results = swept(tmp_path, key, values, f"python -m loraplus_hydra {words}")
    assert summary.extension(results) == ([], "")


def test_corner_of_two_keys_is_one_command(tmp_path: Path) -> None:
    command = "python -m loraplus_hydra hparams_search=lr_grid loraplus.lr_A=1e-4,3e-4,1e-3"
    write_sweep(tmp_path, name="corner", command=command, swept=["loraplus.lr_A", "loraplus.lr_B"])
    for place, (lr_A, lr_B) in enumerate((a, b) for a in (1e-4, 3e-4, 1e-3) for b in (1e-3, 1e-2, 1e-1)):
        job = {"loraplus.lr_A": lr_A, "loraplus.lr_B": lr_B}
        write_job(tmp_path / str(place), job, 4 + 100 * lr_A - lr_B)
    sentences, words = extension(results_of(tmp_path))
    assert [sentence.rpartition(" ")[2] for sentence in sentences] == ["3e-5.", "1."]
    given = ["loraplus.lr_A=1e-4,3e-4,1e-3,3e-5", "loraplus.lr_B=1e-3,0.01,0.1,1"]
    assert words == ["hparams_search=lr_grid", *given]


def test_command_that_did_not_run_the_best_job_gets_its_values(tmp_path: Path) -> None:
    command = "python -m loraplus_hydra -m sweep.name=two loraplus.ratio=1 optimizer.lr=2e-4,4e-4"
    write_sweep(tmp_path, name="two", command=command, swept=["optimizer.lr", "loraplus.ratio"])
    jobs = {(1, 1e-4): 3.9, (4, 1e-4): 3.8, (16, 1e-4): 3.5, (1, 2e-4): 3.7, (1, 4e-4): 3.6}
    for (ratio, lr), value in jobs.items():
        write_job(tmp_path / f"{ratio}_{lr}", {"loraplus.ratio": ratio, "optimizer.lr": lr}, value)
    sentences, words = extension(results_of(tmp_path))
    # lr 1e-4 is the smallest one, too
    assert [sentence.rpartition(" ")[2] for sentence in sentences] == ["5e-5.", "64."]
    assert words == ["-m", "sweep.name=two", "loraplus.ratio=1,16,64", "optimizer.lr=2e-4,4e-4,1e-4,5e-5"]


def test_page_and_terminal_show_the_command(tmp_path: Path, cli: Callable[..., Finished]) -> None:
    command = "python -m loraplus_hydra -m optimizer.lr=1e-4,1e-3,1e-2"
    swept(tmp_path / "sweep", "optimizer.lr", {1e-4: 3.9, 1e-3: 3.7, 1e-2: 3.6}, command)
    finished = cli("report", str(tmp_path / "sweep"))
    assert finished.status == 0
    assert "At the grid's edge: optimizer.lr 0.01 is the largest value. Extend to 0.1.\n" in finished.out
    assert f"Extend the sweep:\n  {command},0.1\n" in finished.out
    write_report(tmp_path / "sweep")
    assert f'<pre id="extend">{command},0.1</pre>' in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.slow
def test_printed_command_extends_the_sweeps_folder(
    tmp_path: Path, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    short = ["task.samples=0", "trainer.max_steps=2", "trainer.eval_strategy=no"]
    first = cli("-m", *tiny_run, *short, "optimizer.lr=1e-5,1e-4,1e-3")
    assert first.status == 0
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    words = shlex.split(summary.extension(results_of(folder))[1])
    assert words[-1] == "optimizer.lr=1e-5,1e-4,1e-3,0.01"
    second = cli(*words[3:])
    assert second.status == 0
    assert [path.name for path in (tmp_path / "outputs" / "sweeps").iterdir()] == [folder.name]
    rates = [job.config["optimizer.lr"] for job in results_of(folder).sweep.jobs]
    assert sorted(rates) == [1e-5, 1e-4, 1e-3, 1e-2]
    assert json.loads((folder / "sweep.json").read_text())["command"] == shlex.join(words)
