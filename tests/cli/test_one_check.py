"""Each command checks its config once, builds one model without weights, and hashes a checkpoint's files once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.check import dry_run, problems
from loraplus_hydra.io import checkpoints
from loraplus_hydra.training import prepare
from tests.conftest import Finished

Cli = Callable[..., Finished]
SHORT = ("trainer.max_steps=2", "trainer.save_steps=2")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often a config was checked, a model was built on the meta device, and each file was hashed."""
    found: Counter[Any] = Counter()

    def count(module: Any, name: str, key: Callable[..., Any]) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found[key(*args)] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(problems, "check_config", lambda *_: "check")
    count(dry_run, "meta_model", lambda *_: "meta model")
    count(prepare, "meta_model", lambda *_: "meta model")
    count(checkpoints, "_sha256", lambda path: path)
    return found


def hashed(calls: Counter[Any]) -> dict[str, int]:
    """Return how often each file of checkpoint-2 was hashed."""
    return {path.name: calls[path] for path in calls if isinstance(path, Path) and path.parent.name == "checkpoint-2"}


@pytest.mark.parametrize("command", ["check", "inspect", "preview", "train"])
def test_command_checks_its_config_once(command: str, cli: Cli, tiny_run: list[str], calls: Counter[Any]) -> None:
    finished = cli(command, *tiny_run, *SHORT)
    assert finished.status == 0, finished.err
    assert (calls["check"], calls["meta model"]) == (1, 1)


@pytest.mark.parametrize("command", ["resume", "auto", "another run"])
def test_run_that_resumes_is_checked_and_hashed_once(
    command: str, cli: Cli, tiny_run: list[str], tmp_path: Path, calls: Counter[Any]
) -> None:
    folder = tmp_path / "run"
    assert cli(*tiny_run, *SHORT, f"hydra.run.dir={folder}").status == 0
    calls.clear()
    more = "trainer.max_steps=3"
    if command == "resume":
        finished = cli("resume", str(folder), more)
    elif command == "auto":
        again = ("trainer.save_steps=2", f"hydra.run.dir={folder}", "trainer.resume_from_checkpoint=auto")
        finished = cli(*tiny_run, more, *again)
    else:
        named = f"trainer.resume_from_checkpoint={folder / 'checkpoints' / 'checkpoint-2'}"
        folder = tmp_path / "new"
        finished = cli(*tiny_run, more, named, f"hydra.run.dir={folder}")
    assert finished.status == 0, finished.err
    assert json.loads((folder / "result.json").read_text())["resumed_at"] == [2]
    assert (calls["check"], calls["meta model"]) == (1, 1)
    assert hashed(calls)
    assert set(hashed(calls).values()) == {1}


def test_each_job_of_a_sweep_is_checked_and_hashed_once(
    cli: Cli, tiny_run: list[str], tmp_path: Path, calls: Counter[Any]
) -> None:
    sweep = (*tiny_run, *SHORT, "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert cli(*sweep).status == 0
    assert (calls["check"], calls["meta model"]) == (2, 2)
    result = next((tmp_path / "sweep").glob("seed-1*/result.json"))
    result.write_text(result.read_text().replace('"status": "ok"', '"status": "interrupted"'))
    calls.clear()
    assert cli(*sweep).status == 0
    assert json.loads(result.read_text())["resumed_at"] == [2]
    assert (calls["check"], calls["meta model"]) == (1, 1)
    assert hashed(calls)
    assert set(hashed(calls).values()) == {1}
