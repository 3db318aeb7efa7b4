"""A sweep whose folder has links, or whose report would be written through one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.report import write
from loraplus_hydra.report.write import write_report
from tests.conftest import Finished
from tests.support.finished_sweeps import ratio_sweep
from tests.support.hostile import files_of, refused


@pytest.mark.parametrize("name", [".jobs", "sweep.json", "seed-1_0123abcd", "seed-1_0123abcd/checkpoints"])
def test_sweep_with_a_link_is_refused_and_nothing_outside_is_removed(
    name: str, tmp_path: Path, tiny_run: list[str], cli: Callable[..., Finished]
) -> None:
    victim = tmp_path / "victim"
    (victim / "photos").mkdir(parents=True)
    (victim / "photos" / "a.jpg").write_text("precious")
    place = tmp_path / "sweep" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(victim)
    before = files_of(tmp_path)
    refused(cli("-m", *tiny_run, "seed=1,2", "hydra.sweep.dir=sweep"), f"{name} is a link")
    assert files_of(tmp_path) == before


def test_link_that_leads_to_the_sweep_is_followed(
    tmp_path: Path, tiny_run: list[str], cli: Callable[..., Finished]
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to("disk")
    quick = ("trainer.max_steps=1", "task.samples=0", "trainer.eval_strategy=no")
    assert cli("-m", *tiny_run, *quick, "seed=1,2", "hydra.sweep.dir=outputs/sweep").status == 0
    assert (tmp_path / "disk" / "sweep" / "results.csv").is_file()


@pytest.mark.parametrize("name", [pytest.param("results.csv", marks=pytest.mark.slow), "report.html", "curves.png"])
def test_report_is_not_written_through_a_link(name: str, tmp_path: Path) -> None:
    ratio_sweep(tmp_path / "sweep", {(1, 1): 3.7, (4, 1): 3.6})
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "sweep" / name).symlink_to(tmp_path / "mine.txt")
    (tmp_path / "sweep" / f".{name}.unfinished").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(UserError, match=f"{name} is a link"):
        write_report(tmp_path / "sweep")
    (tmp_path / "sweep" / name).unlink()
    write_report(tmp_path / "sweep")
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "param_groups.json", "result.json", "config.yaml", ".hydra/overrides.yaml"]
)
def test_fifo_costs_the_report_its_own_job_at_most(name: str, tmp_path: Path) -> None:
    ratio_sweep(tmp_path, {(1, 1): 3.7, (4, 1): 3.6, (4, 2): 3.5})
    job = sorted(path for path in tmp_path.iterdir() if path.is_dir())[0]
    (job / name).unlink(missing_ok=True)
    os.mkfifo(job / name)
    report = write_report(tmp_path)
    assert f"{name} can't be read" in next(one.reason for one in report.sweep.jobs if one.folder == job.name)
    assert sum(one.has_result for one in report.sweep.jobs) >= 2


def test_one_process_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratio_sweep(tmp_path, {(1, 1): 3.7, (4, 1): 3.6})
    monkeypatch.setattr(write, "_PATIENCE", 0.1)
    with folder_lock(tmp_path), pytest.raises(UserError, match="another report is being written"):
        write_report(tmp_path)
    write_report(tmp_path)
