"""A logger's settings are checked before a run; each error names its fix."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.training.trackers.mlflow import resolve_uri
from tests.support import tracker_files
from tests.support.tracker_files import installed, nobody_logged_in, same
from tests.training.test_distributed import ROOT

pytestmark = pytest.mark.extras


__all__ = ["nobody_logged_in"]


@pytest.mark.parametrize(
    "target",
    [
        "torch.optim.AdamW",
        "wandb.Settings",
        "loraplus_hydra.runs.job.run",
        "loraplus_hydra.training.trackers.tracking.Tracking",
    ],
)
def test_logger_of_the_wrong_kind_is_refused(target: str, compose: Callable[..., Any], tiny_run: list[str]) -> None:
    if target.startswith("wandb"):
        pytest.importorskip("wandb")
    with pytest.raises(ConfigErrors) as refused:
        run(compose(*tiny_run, f"logger._target_={target}"), Path("run"))
    (problem,) = refused.value.problems
    assert problem.key == "logger._target_"
    assert "must be a class derived from loraplus_hydra.training.trackers.tracker.Tracker" in problem.fix


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "mlflow"])
def test_logger_that_is_not_installed_says_how_to_install_it(
    logger: str, compose: Callable[..., Any], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == logger else find(name, *rest))
    with pytest.raises(ConfigErrors) as refused:
        run(compose(*tiny_run, f"logger={logger}"), Path("run"))
    (problem,) = refused.value.problems
    assert problem.key == "logger"
    assert f"pip install 'loraplus_hydra[{logger}]'" in problem.what


def test_extras_install_what_the_trackers_need() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python since 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    from loraplus_hydra.training.trackers.mlflow import MLflow
    from loraplus_hydra.training.trackers.tensorboard import TensorBoard
    from loraplus_hydra.training.trackers.wandb import WandB

    for tracker in (MLflow, TensorBoard, WandB):
        for module in tracker.needs:
            assert any(text.startswith(module) for text in extras[tracker.extra]), module


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logger.mode=online", "set WANDB_API_KEY, run `wandb login`"),
        ("logger.mode=onlien", "it must be one of offline, online"),
        ("+logger.projekt=x", "WandB takes no argument 'projekt' (did you mean 'project'?)"),
        ("logger.tags=5", "'5' is not a list"),
    ],
)
def test_wrong_settings_of_wandb_are_told_in_the_check(
    override: str, message: str, compose: Callable[..., Any], tiny_run: list[str]
) -> None:
    with pytest.raises(ConfigErrors) as refused:
        run(compose(*tiny_run, *installed("wandb"), override), Path("run"))
    assert message in str(refused.value)


def test_wandb_online_without_a_key_asks_nothing_on_a_terminal(tiny_run: list[str], tmp_path: Path) -> None:
    import pty

    installed("wandb")
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "loraplus_hydra", *tiny_run, "logger=wandb", "logger.mode=online"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=other, stdout=other, stderr=other, timeout=600, check=False
    )
    os.set_blocking(terminal, False)
    output = os.read(terminal, 100_000).decode()
    os.close(terminal), os.close(other)
    assert done.returncode == 1, output
    assert "WANDB_API_KEY" in output
    assert "Enter your choice" not in output


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_wandb_online_with_a_key_is_no_mistake(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from loraplus_hydra.training.trackers.wandb import WandB

    assert len(WandB.problems(mode="online")) == 1
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    else:
        host = WandB.problems(mode="online")[0].partition("no key for ")[2].partition(":")[0]
        (tmp_path / "no-netrc").write_text(f"machine {host}\n  login user\n  password {'x' * 40}\n")
    assert WandB.problems(mode="online") == []


def test_no_module_imports_a_tracker_when_it_is_imported() -> None:
    for path in (ROOT / "loraplus_hydra").rglob("*.py"):
        outermost: list[Any] = list(ast.parse(path.read_text(encoding="utf-8")).body)
        for node in outermost:
            if isinstance(node, ast.Try):
                outermost += [*node.body, *node.handlers, *node.orelse, *node.finalbody]
            elif isinstance(node, ast.ExceptHandler | ast.With):
                outermost += node.body
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                outermost += [*node.body, *node.orelse]
        names = [alias.name for node in outermost if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in outermost if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if {"mlflow", "wandb", "tensorboard"} & set(name.split(".")[:3:2])], path


@pytest.mark.slow
def test_nothing_of_a_tracker_is_imported_for_a_run_without_one() -> None:
    program = """
        import sys
        import trl.trainer.callbacks  # which imports wandb where it is installed
        before = set(sys.modules)
        import loraplus_hydra.runs.job, loraplus_hydra.training.trackers.tracking
        import loraplus_hydra.training.trackers.mlflow, loraplus_hydra.training.trackers.wandb
        import loraplus_hydra.training.trackers.tensorboard
        print(sorted({"mlflow", "wandb", "tensorboard"} & (set(sys.modules) - before)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_places_of_mlflow_s_stores() -> None:
    here = Path("/home/me")
    assert resolve_uri("sqlite:///outputs/a.db", here) == ("sqlite:////home/me/outputs/a.db", here / "outputs" / "a.db")
    assert resolve_uri("sqlite:////elsewhere/a.db", here) == ("sqlite:////elsewhere/a.db", Path("/elsewhere/a.db"))
    assert resolve_uri("mlruns", here) == ("file:///home/me/mlruns", here / "mlruns")
    assert resolve_uri("file:///my/ml%20runs", here) == ("file:///my/ml%20runs", Path("/my/ml runs"))
    assert resolve_uri("http://localhost:5000", here) == ("http://localhost:5000", None)


def test_mlflow_s_store_may_be_a_folder(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, *installed("mlflow"), "logger.tracking_uri=store", "task.samples=0", "trainer.max_steps=1"]
    run(compose(*overrides), tmp_path / "run")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    same(tracker_files.of_mlflow(client, tmp_path / "run"), tracker_files.of_metrics_file(tmp_path / "run"))
