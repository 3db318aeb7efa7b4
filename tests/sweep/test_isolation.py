"""Jobs in one process share no optimizer state, and a job's memory is freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

States = dict[str, tuple[torch.dtype, ...]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[weakref.ref[Any]], list[States]]:
    """Return lists to which each run adds its model (weakly) and its optimizer states' dtypes."""
    from loraplus_hydra.runs import job
    from loraplus_hydra.training.hf_trainer import train as training

    models: list[weakref.ref[Any]] = []
    states: list[States] = []
    train = training.train

    def watching(trainer: Any, *rest: Any) -> Any:
        models.append(weakref.ref(trainer.model))
        returned = train(trainer, *rest)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        states.append(
            {
                name: tuple(
                    value.dtype
                    for key, value in sorted(optimizer.state[parameter].items())
                    if key in ("state1", "state2")
                )
                for group in optimizer.param_groups
                for name, parameter in zip(group["param_names"], group["params"], strict=True)
            }
        )
        return returned

    monkeypatch.setattr(job, "train", watching)
    return models, states


@pytest.mark.parametrize("count", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_8bit_jobs_in_one_process_are_as_each_alone(
    count: int,
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
    watched: tuple[list[weakref.ref[Any]], list[States]],
) -> None:
    from bitsandbytes.optim import GlobalOptimManager

    from loraplus_hydra import run

    models, states = watched
    base = [*tiny_run, "optimizer=adamw8bit", "adapter.r=128", "trainer.max_steps=1", "task.samples=0"]
    # LoRA on the output layer's kind and on embeddings; without TRL's tied-head rule in the way
    kinds = [[*base, "adapter.target_modules=[q_proj,embed_tokens]"], [*base, "adapter.target_modules=[q_proj,v_proj]"]]
    for number in range(count):
        run(compose(*kinds[number % 2]), tmp_path / str(number))
    for number, found in enumerate(states):
        assert found == states[number % 2], f"job {number}"
        for name, dtypes in found.items():
            wanted = torch.float32 if "embedding" in name else torch.uint8
            big_enough = ("embedding" in name) or "q_proj" in name
            assert not big_enough or set(dtypes) == {wanted}, name
    assert any("embedding" in name for name in states[0])
    assert not any("embedding" in name for name in states[1])
    manager = GlobalOptimManager.get_instance()
    assert manager.pid2config == {}
    assert manager.index2config == {}
    assert manager.module_weight_config_triple == []
    gc.collect()
    assert [number for number, model in enumerate(models) if model() is not None] == []
