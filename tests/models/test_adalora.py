"""AdaLoRA: ranks cut over the run's own steps, the penalty in gradients only, and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file

import loraplus_hydra
from loraplus_hydra import run
from loraplus_hydra.errors import UserError
from loraplus_hydra.models import adalora
from loraplus_hydra.models.adalora import AdaLoraCallback, orthogonality, phases
from loraplus_hydra.models.adapter import add_adapter, schedule_of
from loraplus_hydra.runs.evaluate import evaluate
from loraplus_hydra.runs.finished import open_run
from tests.conftest import Finished
from tests.support.architectures import TOKENS, base_of


def ada_run(tiny_run: list[str], compose: Callable[..., Any], folder: Path, *overrides: str) -> Any:
    ranks: list[int] = []
    budgets: list[int] = []
    after = adalora.AdaLoraCallback.on_optimizer_step

    def recorded(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after(self, args, state, control, **kwargs)
        ranks.append(sum(sum(kept) for kept in adalora.kept_ranks(self.tuner.model).values()))
        budgets.append(self.tuner.rankallocator.budget_schedule(state.global_step + 1)[0])

    adalora.AdaLoraCallback.on_optimizer_step = recorded  # type: ignore[method-assign]
    try:
        base = ["adapter=adalora", "loraplus=roles", "adapter.deltaT=1", "adapter.init_r=6", "adapter.target_r=2"]
        result = run(compose(*tiny_run, *base, "task.samples=0", *overrides), folder)
    finally:
        adalora.AdaLoraCallback.on_optimizer_step = after  # type: ignore[method-assign]
    return result, ranks, budgets


def test_adalora_cuts_ranks_as_its_schedule_says(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    """Steps 1 and 2 of 20 keep all ranks, then they fall by the cube, and the last 5 steps train at the target."""
    overrides = ("trainer.max_steps=20", "adapter.tinit=0.1", "adapter.tfinal=0.25", "optimizer.lr=1e-2")
    result, ranks, budgets = ada_run(tiny_run, compose, tmp_path / "run", *overrides)
    layers = 14
    expected = [
        6 * layers if step <= 2 else int(4 * layers * max(0.0, 1 - (step - 2) / 13) ** 3 + 2 * layers)
        for step in range(1, 21)
    ]
    assert budgets == expected, "PEFT's own schedule, over the run's own steps"
    assert all(rank <= budget for rank, budget in zip(ranks, budgets, strict=True))
    assert ranks[:2] == [84, 84]
    assert ranks[-6:] == [2 * layers] * 6
    assert ranks == sorted(ranks, reverse=True)

    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (stored["total_step"], stored["tinit"], stored["tfinal"]) == (20, 2, 5)
    assert stored["orth_reg_weight"] == 0.1
    assert sum(sum(kept) for kept in stored["rank_pattern"].values()) == 2 * layers
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(len(tensor) for name, tensor in tensors.items() if "lora_E" in name) == 2 * layers
    assert result.value == pytest.approx(evaluated(tmp_path / "run"), abs=1e-5)


def evaluated(folder: Path) -> float:
    return evaluate(open_run(str(folder), groups=None))["eval_loss"]


def test_adalora_penalty_is_in_the_gradients_once_and_in_no_loss(checkpoints: Any, compose: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = add_adapter(base_of(checkpoints("llama")), compose("adapter=adalora").adapter, "CAUSAL_LM")
    plain = base_of(checkpoints("llama"))
    callback = AdaLoraCallback(model, 0, 0)
    losses = [one(input_ids=TOKENS, labels=TOKENS).loss for one in (model, plain)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    named = dict(model.named_parameters())
    name = next(name for name in named if ".lora_A." in name)
    without = named[name].grad.clone()
    callback.on_pre_optimizer_step(None, None, None)
    expected = torch.autograd.grad(0.1 * orthogonality(model.base_model.model), named[name])[0]
    torch.testing.assert_close(named[name].grad, without + expected)
    # PEFT's own term, which it adds to a loss
    del model.base_model.forward
    with_penalty = model(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(with_penalty - losses[1], 0.1 * orthogonality(model.base_model.model))


@pytest.mark.parametrize("stopped_after", [4, 16])  # while ranks are cut, and after
def test_adalora_resumes_to_the_unbroken_runs_ranks_and_weights(
    stopped_after: int, tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    overrides = ("trainer.max_steps=20", "adapter.tinit=2", "adapter.tfinal=5", "optimizer.lr=1e-2")
    overrides += (f"trainer.save_steps={stopped_after}", "trainer.save_total_limit=null")
    whole, ranks, _ = ada_run(tiny_run, compose, tmp_path / "whole", *overrides)
    kept = tmp_path / "whole" / "checkpoints" / f"checkpoint-{stopped_after}"
    again, rest, _ = ada_run(
        tiny_run, compose, tmp_path / "again", *overrides, f"trainer.resume_from_checkpoint={kept}"
    )
    assert rest == ranks[stopped_after:]
    assert again.value == whole.value
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_uncut_adapter_trains_further_with_the_run_s_own_penalty(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    overrides = ("trainer.max_steps=6", "adapter.tinit=4", "adapter.tfinal=0", "trainer.save_steps=3")
    ada_run(tiny_run, compose, tmp_path / "first", *overrides, "adapter.orth_reg_weight=0.3")
    stored = tmp_path / "first" / "checkpoints" / "checkpoint-3"

    def continued(name: str, adapter: str, *more: str) -> tuple[float, dict[str, torch.Tensor]]:
        base = [adapter, f"adapter.path={stored}", "loraplus=roles", "task.samples=0", "trainer.max_steps=4"]
        run(compose(*tiny_run, *base, "trainer.save_steps=2", *more), tmp_path / name)
        folder = tmp_path / name
        weights = {
            json.loads((each / "adapter_config.json").read_text())["orth_reg_weight"]
            for each in (folder / "adapter", folder / "checkpoints" / "checkpoint-2")
        }
        (weight,) = weights
        return weight, load_file(folder / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")

    assert json.loads((stored / "adapter_config.json").read_text())["orth_reg_weight"] == 0.3
    ranks = ("adapter.init_r=6", "adapter.target_r=2", "adapter.deltaT=1")
    without = continued("without", "adapter=adalora", *ranks, "adapter.orth_reg_weight=0")
    own = continued("own", "adapter=adalora", *ranks, "adapter.orth_reg_weight=0.1")
    kept = continued("kept", "adapter=existing")
    assert (without[0], own[0], kept[0]) == (0.0, 0.1, 0.3)
    factors = [name for name in own[1] if "lora_A" in name]
    assert factors
    for one, other in ((without, own), (own, kept)):
        assert any(not torch.equal(one[1][name], other[1][name]) for name in factors)


class OwnConfig(AdaLoraConfig):
    """A method of somebody's own, under another name."""


def test_a_schedule_is_found_by_the_configs_class(checkpoints: Any, compose: Callable[..., Any]) -> None:
    adapter = {**compose("adapter=adalora").adapter, "_target_": f"{__name__}.OwnConfig"}
    model = add_adapter(base_of(checkpoints("llama")), adapter, "CAUSAL_LM", on_meta=False)
    schedule = schedule_of(type(model.active_peft_config))
    assert schedule is not None
    assert [type(each).__name__ for each in schedule.callbacks(model, adapter)] == ["AdaLoraCallback"]
    assert schedule_of(LoraConfig) is None


def test_modules_that_name_adalora() -> None:
    package = Path(loraplus_hydra.__file__).parent
    named = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if "adalora" in path.read_text().lower()
    }
    assert named == {
        *("models/adalora.py", "models/adapter.py", "loraplus/peft_layers.py"),
        "loraplus/factor_pairs.py",  # its layers are no pairs
    }


def test_adaloras_phases() -> None:
    assert phases(100, 0.1, 0.3) == (10, 30)
    assert phases(100, 10, 30) == (10, 30)
    assert phases(2, 0.1, 0.3) == (0, 0), "shares leave room for cutting in the shortest run"
    for total, first, last in ((1, 0, 0), (10, 5, 4), (10, 0.95, 0.3)):
        with pytest.raises(UserError, match="fewer than two"):
            phases(total, first, last)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+adapter.total_step=9", "adapter.total_step: is computed from the run's number of steps"),
        ("adapter.tinit=-1", "adapter.tinit: -1 is out of range"),
        ("adapter.tfinal=2.5", "adapter.tfinal: 2.5 is out of range"),
        ("adapter.tinit=nan", "adapter.tinit: nan is out of range"),
        ("adapter.target_r=12", "adapter.target_r: 12 is not below adapter.init_r = 12"),
        ("adapter.tinit=3", "leave fewer than two"),
    ],
)
def test_wrong_adalora_is_reported(
    override: str, message: str, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, "adapter=adalora", "loraplus=roles", override)
    assert ended.status == 1
    assert message in ended.err
