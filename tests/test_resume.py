"""Nothing lost: a run that is killed or stopped goes on to the numbers of one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.errors import ConfigErrors, UserError
from tests.conftest import Finished
from tests.forking import differences, lines

ROOT = Path(__file__).resolve().parent.parent
# Saves that are no multiple of the logged steps; dropout and accumulation, so that every random state counts.
LONGER = (
    *("trainer.max_steps=30", "trainer.logging_steps=7", "trainer.save_steps=5", "trainer.eval_steps=10"),
    *("trainer.gradient_accumulation_steps=2", "adapter.lora_dropout=0.1", "trainer.save_total_limit=2"),
)
SHORT = ("trainer.max_steps=8", "trainer.logging_steps=3", "trainer.save_steps=2")


def trials(folder: Path, how: str, *overrides: str) -> list[dict[str, Any]]:
    """What `tests.forking` saw."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.forking", str(folder), how, *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_killed(seen: list[dict[str, Any]], kills: int) -> None:
    assert len(seen) == kills
    for trial in seen:
        assert trial["status"] == 0, trial
        assert trial["broken"] == [], trial
        assert trial["differences"] == [], trial
    assert sum(trial["killed"] for trial in seen) >= kills * 3 // 4
    assert sum(trial["in_save"] for trial in seen) >= kills / 3


def test_killed_runs_go_on_to_the_bits_of_the_unbroken_one(tiny_run: list[str], tmp_path: Path) -> None:
    check_killed(trials(tmp_path, "4", *tiny_run, *LONGER), 4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_twenty_killed_runs_go_on_to_the_bits_of_the_unbroken_one(
    optimizer: str, tiny_run: list[str], tmp_path: Path
) -> None:
    # From 4,096 numbers a tensor on bitsandbytes keeps 8-bit state.
    check_killed(trials(tmp_path, "20", *tiny_run, *LONGER, f"optimizer={optimizer}", "adapter.r=128"), 20)


def test_signals_end_a_run_with_a_checkpoint_of_its_last_step(tiny_run: list[str], tmp_path: Path) -> None:
    seen = trials(tmp_path, "signals", *tiny_run, *LONGER, "trainer.max_steps=200", "trainer.eval_steps=100")
    assert [trial["stopped_with"] for trial in seen] == [130, 143]
    for trial in seen:
        assert trial["said"] == "interrupted"
        assert 0 < trial["steps"] == trial["newest"] < 200
        assert (trial["status"], trial["differences"]) == (0, []), trial


@pytest.fixture
def stopped(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Train `overrides` in `folder` and stop as Ctrl-C does in step `at`."""
    from loraplus_hydra.interrupts import StopAtStep

    def train(folder: Path, *overrides: str, at: int) -> None:
        def begin(self: StopAtStep, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.training = True
            if state.global_step == at - 1:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(StopAtStep, "on_step_begin", begin)
            with pytest.raises(KeyboardInterrupt):
                run(compose(*overrides), folder)

    return train


VARIANTS = {
    "dropout": ("adapter.lora_dropout=0.1",),
    "8-bit optimizer": ("optimizer=adamw8bit", "adapter.r=128", "adapter.lora_dropout=0.1"),
    "paged 32-bit optimizer": ("optimizer=paged_adamw32bit",),
    "Lion": ("optimizer=lion",),
    "muon": ("optimizer=muon",),
    "PiSSA": ("adapter=pissa",),
    "OLoRA": ("adapter=olora",),
    "DoRA": ("adapter=dora", "adapter.lora_dropout=0.1"),
    "A = 0": ("adapter=lora_a_zero",),
    "AdaLoRA": ("adapter=adalora", "adapter.tinit=1", "adapter.tfinal=1"),
    "VeRA": ("adapter=vera", "loraplus=roles", "adapter.vera_dropout=0.1"),
    "LoRA on embeddings": ("adapter=lora_embeddings",),
    "saved modules": ("+adapter.modules_to_save=[lm_head]",),
    "new tokens": ("model.add_tokens=[new_a,new_b]",),
    "cosine": ("scheduler=cosine", "scheduler.warmup_ratio=0.3"),
    "one cycle": ("scheduler=one_cycle",),
    "epochs": ("trainer.max_steps=-1", "trainer.num_train_epochs=2", "trainer.eval_strategy=epoch"),
    "nf4": ("quantization=nf4",),
    "no clipping": ("trainer.max_grad_norm=0",),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_run_goes_on_to_the_bits_of_the_unbroken_one(
    variant: str, stopped: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *SHORT, *VARIANTS[variant]]
    run(compose(*overrides), tmp_path / "unbroken")
    stopped(tmp_path / "broken", *overrides, at=5)
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["status"] == "interrupted"
    result = run(compose(*overrides, "trainer.resume_from_checkpoint=auto"), tmp_path / "broken")
    assert result.resumed_at == [5]
    assert differences(tmp_path / "broken", tmp_path / "unbroken") == []
    assert [line["step"] for line in lines(tmp_path / "broken")] == sorted(
        line["step"] for line in lines(tmp_path / "unbroken")
    )
