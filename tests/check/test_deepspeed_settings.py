"""Settings of DeepSpeed that would train something else than the config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.training.deepspeed_settings import complete_settings
from tests.conftest import Finished


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of torchrun with one process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["trainer.deepspeed.gradient_clipping=0.5"], "gradient_clipping: is 0.5, but trainer.max_grad_norm is 1.0"),
        (["trainer.deepspeed.train_micro_batch_size_per_gpu=3"], "but trainer.per_device_train_batch_size is"),
        (["+trainer.deepspeed.train_batch_size=3"], "train_batch_size: is 3, but"),
        (["trainer.deepspeed.bf16.enabled=true"], "bf16.enabled: is True, but trainer.bf16 is False"),
        (["+trainer.deepspeed.fp16={enabled: true}"], "fp16.enabled: is True, but trainer.fp16 is False"),
        (["+trainer.deepspeed.optimizer={type: Adam}"], "its block 'optimizer' would replace the optimizer group"),
        (["+trainer.deepspeed.scheduler={type: X}"], "its block 'scheduler' would replace the scheduler group"),
        (["optimizer=adamw8bit"], "AdamW8bit keeps 32-bit state for some tensors, but DeepSpeed joins"),
        (["optimizer=adafactor"], "Adafactor's step depends on a tensor's shape, but DeepSpeed joins"),
        (["optimizer=muon"], "Muon's step depends on a tensor's shape, but DeepSpeed joins"),
        (["optimizer=lora_fa"], "LoraFA needs whole tensors, which DeepSpeed and FSDP split"),
        (["trainer.auto_batch=true"], "trainer.auto_batch: can't be used with DeepSpeed"),
        (["trainer.deepspeed=missing.json"], "trainer.deepspeed: it can't be read"),
        (["trainer.deepspeed=list.json"], "list.json doesn't contain a mapping"),
    ],
)
def test_setting_that_trains_something_else_is_refused(
    overrides: list[str],
    problem: str,
    cli: Callable[..., Finished],
    tiny_run: list[str],
    tmp_path: Path,
    launched: None,
) -> None:
    (tmp_path / "list.json").write_text("[]")
    finished = cli("check", *tiny_run, "trainer=deepspeed", "trainer.use_cpu=true", "trainer.bf16=false", *overrides)
    assert finished.status == 1
    assert problem in finished.err
    assert "Traceback" not in finished.err


def test_missing_launcher_is_told(
    cli: Callable[..., Finished], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    finished = cli("check", *tiny_run, "trainer=deepspeed")
    assert finished.status == 1
    assert "trainer.deepspeed: DeepSpeed needs a launcher, also for one process; start it with torchrun" in finished.err


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"])
def test_deepspeed_that_only_the_environment_asks_for_is_refused(
    name: str, cli: Callable[..., Finished], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    finished = cli("check", *tiny_run)
    assert finished.status == 1
    assert f"{name} asks for DeepSpeed, but the config doesn't" in finished.err


@pytest.mark.parametrize("as_file", [False, True])
def test_values_that_are_left_out_are_the_trainers(
    as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: Any = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}
    if as_file:
        Path("ds.json").write_text(json.dumps(settings))
    assert complete_settings("ds.json" if as_file else settings) == {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
