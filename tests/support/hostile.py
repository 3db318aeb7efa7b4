"""What the tests of input that nobody trusts share: a canary, a run to be spoilt, and how a refusal looks."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.support.finished_runs import finished

__all__ = ["finished"]

COMMANDS: list[list[str]] = [["export"], ["export", "merge=false"], ["predict", "text=say"], ["evaluate"]]


class Touch:
    """A pickle of it makes the canary's file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def pickled(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Touch(canary)))


def truncated(path: Path, canary: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that isn't there; whatever is run by a test's input makes it."""
    return tmp_path_factory.mktemp("canary") / "sang"


@pytest.fixture
def run(finished: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to be spoilt."""
    return Path(shutil.copytree(finished("sft"), tmp_path_factory.mktemp("spoilt") / "run"))


def refused(ended: Finished, *told: str) -> None:
    """One command's end: exit status 1, each of the words said, no traceback, and no error that nobody expected."""
    assert ended.status == 1, ended.out
    for words in told:
        assert words in ended.err
    assert "Traceback" not in ended.out + ended.err
    assert "HYDRA_FULL_ERROR" not in ended.err


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def spoil(run: Path, old: str, new: str, **values: str) -> None:
    """Replace a line of a run's stored config."""
    for file in (run / "config.yaml", run / ".hydra" / "config.yaml"):
        if not file.is_file():
            continue
        text = file.read_text()
        assert old in text
        for name, value in values.items():
            new = new.replace(name, value)
        file.write_text(text.replace(old, new))


def model_of(run: Path) -> str:
    from omegaconf import OmegaConf

    return str(OmegaConf.load(run / "config.yaml").model.path)


def going_on(run: Path) -> list[str]:
    """Overrides of a run that trains on with a run's adapter."""
    from omegaconf import OmegaConf

    rows = OmegaConf.load(run / "config.yaml").data.train
    model = ("model=hub", f"model.path={model_of(run)}")
    return [
        *model,
        "adapter=existing",
        f"adapter.path={run}",
        "data=jsonl",
        f"data.train={rows}",
        "trainer.max_steps=1",
    ]
