"""`report` on the command line, and the command it prints: that of the best job, ready for a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.errors import UserError
from loraplus_hydra.report import summary
from loraplus_hydra.report.results import results_of
from loraplus_hydra.report.write import write_report
from tests.conftest import Finished
from tests.support.finished_sweeps import ratio_sweep, write_job, write_sweep

_RESUMED = "optimizer=adam ++loraplus.ratio=4"


def test_folder_without_jobs_is_told(tmp_path: Path, cli: Callable[..., Finished]) -> None:
    with pytest.raises(UserError, match="has no job"):
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
    command = summary.command(results_of(tmp_path))
    assert command == "python -m loraplus_hydra hparams_search=ratio loraplus.ratio=4 hydra.mode=RUN"


def test_command_of_the_best_job_is_quoted_for_a_shell(tmp_path: Path) -> None:
    write_job(tmp_path / "0", {"data.train": "it's a file.jsonl", "loraplus.ratio": 4}, 3.5)
    command = summary.command(results_of(tmp_path))
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
    from loraplus_hydra.config.identity import run_hash

    run = tmp_path / "runs" / "a"
    words = [*tiny_run, "task.samples=0", "trainer.save_steps=2", "trainer.max_steps=2"]
    assert cli(*words, f"hydra.run.dir={run}").status == 0
    for changes in (
        ["trainer.max_steps=3", "loraplus.ratio=2"],
        ["trainer.max_steps=4", "optimizer.lr=2e-3", "+trainer.label_smoothing_factor=0.0"],
    ):
        assert cli("resume", str(run), *changes).status == 0
        command = shlex.split(summary.command(results_of(tmp_path / "runs")))
        assert command[:3] == ["python", "-m", "loraplus_hydra"]
        stored = OmegaConf.load(run / "config.yaml")
        assert isinstance(stored, DictConfig)
        assert run_hash(compose(*command[3:])) == run_hash(stored)
    # Each resume has a folder of its own, however soon it follows another.
    assert len(list((run / ".hydra").glob("resumed-*"))) == 2


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
    assert summary.command(results_of(tmp_path)) == (f"python -m loraplus_hydra {said}" if said else "")


@pytest.mark.parametrize(
    "search", ["halving=True", "+halving=true", "halving=1", "hparams_search=halving", "tune.budget=9"]
)
def test_the_best_job_of_a_search_runs_again_alone(tmp_path: Path, search: str) -> None:
    folder = write_job(tmp_path / "0", {"loraplus.ratio": 4}, 3.5)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(["loraplus.ratio=4", search]))
    assert summary.command(results_of(tmp_path)) == "python -m loraplus_hydra loraplus.ratio=4"


@pytest.mark.parametrize(
    "flags",
    [
        ["--config-dir", "my conf"],
        ["--config-dir=conf", "--config-name=mine", "-cn", "other"],
        ["-cd", "x", "--config-path=/a"],
    ],
)
def test_the_best_job_runs_again_with_the_configs_of_its_sweep(tmp_path: Path, flags: list[str]) -> None:
    """Without the flags, the program's own config would train, or the option would be unknown."""
    write_job(tmp_path / "0", {"loraplus.ratio": 4}, 3.5)
    sweep = ["python", "-m", "loraplus_hydra", "-m", *flags[:2], "loraplus.ratio=1,4", *flags[2:], "optimizer=mine"]
    write_sweep(tmp_path, command=shlex.join(sweep))
    words = shlex.split(summary.command(results_of(tmp_path)))
    assert words == ["python", "-m", "loraplus_hydra", *flags, "loraplus.ratio=4"]
