"""Reports on broken and hostile job folders."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus_hydra.report.read_job import read_job
from loraplus_hydra.report.read_sweep import read_sweep
from loraplus_hydra.report.results import results_of
from loraplus_hydra.report.write import csv_text, write_report
from tests.support.finished_sweeps import ratio_sweep, write_job, write_sweep


def test_job_that_failed_before_its_config_was_written_has_its_values(tmp_path: Path) -> None:
    ratio_sweep(tmp_path, {(1, 0): 3.7, (4, 0): 3.6})
    bad = tmp_path / "bad"
    (bad / ".hydra").mkdir(parents=True)
    (bad / ".hydra" / "config.yaml").write_text("seed: 0\nmodel: {lr: 1e-4}\noptimizer: {lr: '${..model.lr}'}\n")
    (bad / ".hydra" / "overrides.yaml").write_text("- loraplus.ratio=-3\n- seed=0\n")
    (bad / "result.json").write_text(json.dumps({"status": "failed", "error": {"type": "ConfigErrors", "text": "no"}}))
    job = next(job for job in read_sweep(tmp_path).jobs if job.folder == "bad")
    assert job.config["optimizer.lr"] == 1e-4
    row = next(row for row in csv_rows(write_report(tmp_path).sweep.folder) if row["folder"] == "bad")
    assert row["loraplus.ratio"] == "-3"
    assert row["error"] == "ConfigErrors: no"


def test_report_has_no_passwords_of_addresses(tmp_path: Path) -> None:
    address = "https://me:s3cret@host/rows"
    command = f"python -m loraplus_hydra -m logger.tracking_uri={address} loraplus.ratio=1,2,4"
    write_sweep(tmp_path, name="mine", command=command, swept=["loraplus.ratio"])
    for ratio in (1, 2, 4):
        failed: dict[str, Any] = {"status": "failed", "error": {"type": "OSError", "text": f"no {address}"}}
        values = {"loraplus.ratio": ratio, "data.train": f"{address}{ratio}", "logger.tracking_uri": address}
        write_job(tmp_path / str(ratio), values, 5.0 / ratio, **(failed if ratio == 1 else {}))
    write_report(tmp_path)
    for name in ("report.html", "results.csv"):
        text = (tmp_path / name).read_text()
        assert ("https://host/rows4" in text, "s3cret" in text) == (True, False), name
    assert "no https://host/rows" in (tmp_path / "results.csv").read_text()


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
# 10^15 entries if the aliases were followed.
BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'{k}: *a{i - 1}' for k in 'abcdefghij')}}}\n" for i in range(1, 16)
)
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
    "yaml_bomb": lambda folder: (folder / "config.yaml").write_text(BOMB),
    "no_metrics": lambda folder: (folder / "metrics.jsonl").unlink(),
    "cut_metrics": lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 4}\n[3]\n{"step": 2, "lo'),
    "groups": lambda folder: (folder / "param_groups.json").write_text('[3, {"group": [], "role": {}}, {"lr": "x"}]'),
}
WITH_A_RESULT = {  # another file than the result is broken
    "no_config",
    "yaml",
    "yaml_tag",
    "yaml_bomb",
    "no_metrics",
    "cut_metrics",
    "groups",
}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@given(result=ANY_JSON, config=ANY_JSON, groups=ANY_JSON, lines=st.lists(ANY_JSON, max_size=3), overrides=ANY_JSON)
@settings(max_examples=50)
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


def test_job_is_run_again_without_the_sweeps_own_keys(tmp_path: Path) -> None:
    write_job(tmp_path / "0", {"sweep.swept": "[seed]", "sweep.start": "83da61ce9560", "seed": 1}, 3.6)
    assert read_job(tmp_path / "0").rerun == ("seed=1",)


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
    assert len(report.sweep.jobs) == 200
    assert {job.folder for job in report.sweep.unsuccessful} == set(BROKEN) - WITH_A_RESULT
    assert all(job.reason for job in report.sweep.unsuccessful)
    assert report.sweep.not_jobs == ("empty",)
    page = (tmp_path / "report.html").read_text()
    trouble = page[page.index('<section class="trouble"') :].partition("</section>")[0]
    assert all(f">{name}</a>" in trouble for name in set(BROKEN) - WITH_A_RESULT)
    rows = csv_rows(tmp_path)
    assert len(rows) == 200
    assert {row["folder"] for row in rows if row["status"] == "broken"} >= {"truncated", "list", "junk", "deep"}
    written = {"report.html", "results.csv", "ratio.png", "heatmap.png", "curves.png"}
    assert written <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*.unfinished"))


def test_one_job_and_no_success_make_a_page_too(tmp_path: Path) -> None:
    write_job(tmp_path / "one" / "0", {"loraplus.ratio": 4}, 3.7)
    write_report(tmp_path / "one")
    assert "The only setting has eval_loss 3.7000" in (tmp_path / "one" / "report.html").read_text()
    error = {"type": "ValueError", "text": "bad"}
    for place in range(3):
        job = {"loraplus.ratio": place + 1}
        write_job(tmp_path / "none" / str(place), job, None, status="failed", error=error)
    report = write_report(tmp_path / "none")
    assert len(report.sweep.unsuccessful) == 3
    assert "No job has a result" in (tmp_path / "none" / "report.html").read_text()


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


def test_status_that_no_job_of_ours_has_is_known(tmp_path: Path) -> None:
    write_job(tmp_path / "0", {"loraplus.ratio": 4}, None, status="pruned")
    (job,) = read_sweep(tmp_path).jobs
    assert (job.status, job.reason) == ("pruned", "ended early by a search")
