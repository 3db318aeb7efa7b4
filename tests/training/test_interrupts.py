"""Signals: kept wherever they come, and an evaluation that one stops is made up."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.interrupts import Interrupted
from loraplus_hydra.training.hf_trainer import start_evaluation
from loraplus_hydra.training.hf_trainer.resumable_mixin import ResumableMixin
from tests.conftest import Finished
from tests.support.forking import differences, lines

Cli = Callable[..., Finished]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell's background jobs, in which the tests may run, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def _handling(number: int, handler: Callable[[int], None]) -> Iterator[None]:
    """Inside, let `handler` get a signal, as a program around the run may."""
    before = signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_signal_inside_a_collection_is_kept(number: signal.Signals) -> None:
    def collecting(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(collecting)
        os.kill(os.getpid(), number)

    with interrupts.kept_signals(deliver=False):
        gc.callbacks.append(collecting)
        gc.collect()
        assert interrupts.requested() == number
        with pytest.raises(Interrupted) as stopped:
            interrupts.stop_if_asked()
    assert interrupts.status_of(stopped.value) == 128 + number


def test_signal_in_a_collection_while_the_program_only_waits_is_sent_again() -> None:
    # So waits the parent of a sweep under joblib, where no code of ours sees the flag.
    class Dropping:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # the handler raises here, and Python drops what it raises

    def wait() -> None:
        Dropping()
        time.sleep(5)

    with interrupts.kept_signals(deliver=False):
        interrupts.raise_at_once(True)
        with pytest.raises(Interrupted) as stopped:
            wait()
    assert interrupts.status_of(stopped.value) == 143


def test_report_of_a_stopped_sweep_is_stopped_by_another_signal_only() -> None:
    with interrupts.kept_signals(deliver=False):
        os.kill(os.getpid(), signal.SIGINT)
        with interrupts.answered():
            interrupts.stop_if_asked()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                interrupts.stop_if_asked()
        assert interrupts.requested() == signal.SIGINT


def test_second_signal_raises_at_once() -> None:
    with interrupts.kept_signals(deliver=False):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.status_of(stopped.value) == 143  # by the first


def test_handlers_of_a_caller_get_the_signal_after_the_block() -> None:
    got: list[int] = []
    with _handling(signal.SIGTERM, got.append):
        keeping = interrupts.kept_signals()
        keeping.__enter__()
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == []
        with pytest.raises(Interrupted):
            keeping.__exit__(None, None, None)
        assert got == [signal.SIGTERM]


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_signal_behind_a_job_ends_the_sweep(
    number: signal.Signals, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.sweep import isolation

    monkeypatch.setattr(isolation, "free_memory", lambda: os.kill(os.getpid(), number))
    toy = ("experiment=toy", "data.width=8", "data.steps=2")
    finished = cli("-m", *toy, "seed=1,2,3", "hydra.sweep.dir=sweep")
    assert finished.status == 128 + number, finished.err
    assert [path.parent.name[:6] for path in (tmp_path / "sweep").glob("*/result.json")] == ["seed-1"]
    assert "1 of 3 jobs run: 1 done" in finished.out
    left = "The sweep was stopped before 2 jobs: seed=2, seed=3"
    assert left in finished.out.replace("\n", " ")
    assert left in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_signal_while_the_program_starts_is_kept(number: signal.Signals) -> None:
    program = (
        "import os, runpy, sys\n"
        "def seen(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'hydra':\n"
        f"        os.kill(os.getpid(), {number:d})\n"
        "sys.addaudithook(seen)\n"
        "sys.argv = ['loraplus-hydra', '--help']\n"
        "runpy.run_module('loraplus_hydra', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (128 + number, False), ended.stderr


def test_signal_at_the_end_of_a_command_decides_its_status(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplus_hydra.report import terminal, write

    monkeypatch.setattr(write, "write_report", lambda folder: folder)
    monkeypatch.setattr(terminal, "show", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert cli("report", "sweep").status == 143


EVALUATED = (
    *("trainer.max_steps=4", "trainer.eval_steps=2", "trainer.save_steps=4", "trainer.per_device_eval_batch_size=1"),
    *("adapter.lora_dropout=0.1", "+trainer.load_best_model_at_end=false"),
)


Stopping = Callable[..., list[int]]


@pytest.fixture
def stopped_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> Stopping:
    """Make the evaluation at a step get SIGTERM in its second batch, as a scheduler sends it; count its batches."""

    def at(step: int, *, in_training: bool = True) -> list[int]:
        predict, batches = ResumableMixin.prediction_step, [0]

        def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
            is_here = self.state.global_step == step and self.is_in_train == in_training
            output = predict(self, *args, **kwargs)
            if is_here:
                batches[0] += 1
                if batches[0] == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            return output

        monkeypatch.setattr(ResumableMixin, "prediction_step", signalled)
        return batches

    return at


# The step, whether it is inside training, and more overrides: the base's evaluation, one between steps, the one at the
# last step, and the one after training.
EVALUATIONS = {
    "base": (0, True, ()),
    "between": (2, True, ()),
    "last step": (4, True, ()),
    "after training": (4, False, ("trainer.eval_strategy=no",)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "between" else []) for name in EVALUATIONS]
)
def test_evaluation_that_a_signal_stops_ends_within_a_batch_and_is_made_up(
    name: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, stopped_in_evaluation: Stopping
) -> None:
    step, in_training, more = EVALUATIONS[name]
    overrides = [*tiny_run, *EVALUATED, "data.eval_fraction=0.2", *more]
    run(compose(*overrides), tmp_path / "unbroken")
    start_evaluation._known.clear()  # otherwise the base isn't evaluated again
    place = tmp_path / "stopped"
    batches = stopped_in_evaluation(step, in_training=in_training)
    with _handling(signal.SIGTERM, lambda _: None), pytest.raises(Interrupted):
        run(compose(*overrides), place)
    assert batches == [2]  # of eight
    assert json.loads((place / "result.json").read_text())["status"] == "interrupted"
    if step:
        assert not [line for line in lines(place) if line["step"] == step and "eval_loss" in line]
        state = json.loads((place / "checkpoints" / f"checkpoint-{step}" / "run_state.json").read_text())
        assert state["evaluation_due"] is in_training
    else:
        assert not list(place.glob("checkpoints/*"))
    run(compose(*overrides, "trainer.resume_from_checkpoint=auto"), place)
    assert differences(place, tmp_path / "unbroken") == []
    results = [json.loads((folder / "result.json").read_text()) for folder in (place, tmp_path / "unbroken")]
    for key in ("metrics", "metrics_before"):
        ours, theirs = (
            {k: v for k, v in each[key].items() if "second" not in k and "time" not in k} for each in results
        )
        assert ours == theirs


def test_only_checkpoint_is_kept_until_its_evaluation_is_made_up_and_saved(
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
    stopped_in_evaluation: Stopping,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import Trainer

    overrides = [*tiny_run, *EVALUATED, "data.eval_fraction=0.2", "trainer.save_total_limit=1"]
    run(compose(*overrides), tmp_path / "unbroken")
    place = tmp_path / "stopped"
    stopped_in_evaluation(2, in_training=True)
    with _handling(signal.SIGTERM, lambda _: None), pytest.raises(Interrupted):
        run(compose(*overrides), place)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", full)
        with pytest.raises(UserError, match="the disk is full"):
            run(compose(*overrides, "trainer.resume_from_checkpoint=auto"), place)
    assert [each.name for each in (place / "checkpoints").iterdir()] == ["checkpoint-2"]
    result = run(compose(*overrides, "trainer.resume_from_checkpoint=auto"), place)
    assert result.resumed_at == [2, 2]
    assert differences(place, tmp_path / "unbroken") == []


COMMANDS = {
    # Plain, because the lean forward runs the first batch several times to compare both.
    "evaluate": (
        *("evaluate", "run", "out=metrics.json", "trainer.per_device_eval_batch_size=1", "trainer.forward=plain"),
    ),
    "predict": ("predict", "run", "file=texts.txt", "out=answers.jsonl", "max_new_tokens=1"),
    "export": ("export", "run", "to=exported"),
}


@pytest.fixture(scope="module")
def ended(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register, run_of

    folder = tmp_path_factory.mktemp("ended") / "run"
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        run(run_of(compose("config", overrides=[*tiny_run, "trainer.max_steps=1"])), folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_a_run_say_that_they_stop_and_leave_nothing(
    command: str, ended: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    shutil.copytree(ended, tmp_path / "run")
    (tmp_path / "texts.txt").write_text("say one\n" * 9)
    forward, passes = torch.nn.Embedding.forward, [0]

    def signalled(self: Any, *args: Any) -> Any:
        passes[0] += 1
        if passes[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)

    monkeypatch.setattr(torch.nn.Embedding, "forward", signalled)
    finished = cli(*COMMANDS[command])
    assert finished.status == 143, finished.err
    assert "Stopping: " in finished.err
    assert {"evaluate": "batch", "predict": "answer", "export": "export"}[command] in finished.err
    assert passes[0] <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "texts.txt"]
    assert not (tmp_path / "run" / "export").exists()
