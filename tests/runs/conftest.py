"""Runs that are stopped or killed and then resumed, beside the same run that nothing breaks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from loraplus_hydra import run
from loraplus_hydra.io.result import Result
from loraplus_hydra.runs import job
from tests.conftest import Finished
from tests.support.edits import write_rows
from tests.support.forking import differences

AUTO = "trainer.resume_from_checkpoint=auto"


class Killed(BaseException):
    """Ends a run as SIGKILL does."""


@dataclass(frozen=True)
class Trial:
    """Runs of the tiny model in `folder`: `broken` is broken off and resumed, `unbroken` is neither."""

    folder: Path
    compose: Callable[..., Any]
    tiny_run: list[str]
    stopped: Callable[..., None]
    monkeypatch: pytest.MonkeyPatch

    @property
    def broken(self) -> Path:
        return self.folder / "broken"

    @property
    def unbroken(self) -> Path:
        return self.folder / "unbroken"

    def train(self, *overrides: str, name: str = "unbroken") -> Result:
        """Train in the folder of the name."""
        return run(self.compose(*self.tiny_run, *overrides), self.folder / name)

    def stop(self, *overrides: str, at: int) -> None:
        """Train and stop as Ctrl-C does in step `at`."""
        self.stopped(self.broken, *self.tiny_run, *overrides, at=at)

    def kill(self, *overrides: str, in_evaluation_at: int | None = None, name: str = "broken") -> None:
        """Train and be killed in the evaluation of a step, or else before the adapter is saved."""
        evaluate = Trainer.evaluate

        def die(*args: Any) -> None:
            raise Killed

        def evaluate_or_die(trainer: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
            if trainer.state.global_step == in_evaluation_at:
                raise Killed
            return evaluate(trainer, *args, **kwargs)

        with self.monkeypatch.context() as patch:
            patch.setattr(job, "_save", die)
            patch.setattr(Trainer, "evaluate", evaluate_or_die)
            with pytest.raises(Killed):
                self.train(*overrides, name=name)
        (self.folder / name / "result.json").unlink()

    def resume(self, *overrides: str, name: str = "broken") -> Result:
        """Resume the run of the name."""
        return self.train(*overrides, AUTO, name=name)

    def resume_to_the_same(self, *overrides: str) -> Result:
        """Resume the broken run, and fail unless it ends with the bits of one that nothing breaks."""
        self.train(*overrides)
        result = self.resume(*overrides)
        assert differences(self.broken, self.unbroken) == []
        configs = [(each / "adapter" / "adapter_config.json").read_text() for each in (self.broken, self.unbroken)]
        assert configs[0] == configs[1]
        return result


@pytest.fixture(scope="session")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of `trained` is kept."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def trained(cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path, kept_run: Path) -> Path:
    """The folder `run` of a finished run of the command line with checkpoints; it is trained once a session."""
    if kept_run.exists():
        shutil.copytree(kept_run, tmp_path / "run")
    else:
        assert cli(*tiny_run, "trainer.save_steps=2", "hydra.run.dir=run").status == 0
        shutil.copytree(tmp_path / "run", kept_run)
    return tmp_path / "run"


@pytest.fixture
def trial(
    tmp_path: Path,
    compose: Callable[..., Any],
    tiny_run: list[str],
    stopped: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Trial:
    return Trial(tmp_path, compose, tiny_run, stopped, monkeypatch)


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a model, the finished run `done` and the stopped run `stopped`, which has a checkpoint."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register, run_of

    folder = tmp_path_factory.mktemp("content")
    shutil.copytree(tiny_model, folder / "model")
    for name in ("rows", "held_out"):
        write_rows(folder / f"{name}.jsonl", name)
    overrides = [
        *("model=hub", f"model.path={folder / 'model'}", "data=jsonl", f"data.train={folder / 'rows.jsonl'}"),
        *(f"data.eval={folder / 'held_out.jsonl'}", "trainer.max_steps=4", "trainer.save_steps=2", "task.samples=0"),
        *("trainer.per_device_train_batch_size=4", "trainer.eval_strategy=no"),
    ]
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        run(run_of(compose("config", overrides=overrides)), folder / "done")
    shutil.copytree(folder / "done", folder / "stopped")
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(folder / "stopped" / name)
    (folder / "stopped" / "result.json").unlink()
    return folder


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """The folder of `place` moved to where commands start; the stored paths lead into the copy."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*/config.yaml"):
        file.write_text(file.read_text().replace(str(place), str(tmp_path)))
    return tmp_path
