"""The Trainer's walks over modules, made once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from loraplus_hydra import run
from loraplus_hydra.training.lean import adopt as adopting


def test_no_step_walks_over_the_modules(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts per step what `named_modules`, `named_parameters` and `train` of the whole model are asked for."""
    from loraplus_hydra.training.hf_trainer import assemble

    calls: Counter[str] = Counter()
    of_step: list[Counter[str]] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            calls.clear()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            of_step.append(Counter(calls))

    def watch(model: Any) -> None:
        for name in ("named_modules", "named_parameters", "modules", "children"):
            own = getattr(nn.Module, name)

            def counted(self: Any, *args: Any, name: str = name, own: Any = own, **kwargs: Any) -> Any:
                calls[name] += self in whole
                return own(self, *args, **kwargs)

            monkeypatch.setattr(nn.Module, name, counted)
        whole.update({model, model.get_base_model(), model.base_model})

    whole: set[Any] = set()
    own_adopt = adopting.adopt

    def adopt(trainer: Any, forward: str) -> None:
        own_adopt(trainer, forward)
        trainer.add_callback(Steps())
        watch(trainer.model)

    monkeypatch.setattr(assemble, "adopt", adopt)
    run(compose(*tiny_run, "trainer.forward=lean", "trainer.eval_strategy=no", "trainer.logging_steps=4"), tmp_path)

    assert len(of_step) == 4
    assert all(sum(each.values()) == 0 for each in of_step[1:3]), of_step


def test_clipping_modes_gradients_and_operations_are_the_trainer_s_own(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = tmp_path / "cached", tmp_path / "own"
    for folder in folders:
        if folder.name == "own":
            monkeypatch.setattr(adopting, "walk_once", id)
        run(compose(*tiny_run, "trainer.forward=plain", "trainer.max_grad_norm=0.1"), folder)

    cached, own = (
        json.loads((folder / "checkpoints/checkpoint-4/trainer_state.json").read_text()) for folder in folders
    )
    assert cached["total_flos"] == own["total_flos"] > 0
    keys = ("step", "loss", "grad_norm", "eval_loss")
    assert [[line.get(key) for key in keys] for line in cached["log_history"]] == [
        [line.get(key) for key in keys] for line in own["log_history"]
    ]
    adapters = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders]
    assert adapters[0] == adapters[1]


def test_gradients_are_dropped_and_modes_switched() -> None:
    from types import SimpleNamespace

    from loraplus_hydra.training.module_walks import walk_once

    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model.num_parameters = lambda: 6  # type: ignore[assignment]
    model[0].bias.requires_grad_(False)
    clip = torch.nn.utils.clip_grad_norm_
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(clip_grad_norm_=clip))
    model[1].eval()  # as a loaded base is under a new adapter
    walk_once(trainer)

    assert model.train()[1].training
    assert not model.eval()[1].training
    assert model.train()[1].training
    model(torch.ones(64, 2)).sum().backward()  # of so many numbers dropout keeps some
    assert trainer.accelerator.clip_grad_norm_(None, 0.5) > 0
    model.zero_grad()
    assert model[0].weight.grad is None
