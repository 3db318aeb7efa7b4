"""LoftQ's start against a dense decomposition in numpy, and what it leaves as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loraplus_hydra import run
from loraplus_hydra.models.adapter_files import stored_adapter
from loraplus_hydra.models.loftq import closest_factors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.training.prepare import load_adapted_model, plan_on_meta, prepare_examples
from tests.conftest import Finished
from tests.support.architectures import base_of, checkpoint

TOKENS = torch.arange(3, 51).reshape(4, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def started(llama: Path, rows: Path, compose: Callable[..., Any]) -> Callable[..., Any]:
    def start(*overrides: str) -> Any:
        config = compose("model=hub", f"model.path={llama}", "data=jsonl", f"data.train={rows}", *overrides)
        tokenizer = load_tokenizer(config.model)
        return load_adapted_model(config, tokenizer, prepare_examples(config, tokenizer))

    return start


def dequantised(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight after 4 bits, by bitsandbytes alone."""
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize(
    ("kind", "also", "scale"),
    [
        ("nf4", [], 16 / 8),
        ("fp4", ["quantization.bnb_4bit_quant_type=fp4", "adapter.r=4", "adapter.lora_alpha=2"], 2 / 4),
        ("nf4", ["adapter.r=16", "+adapter.use_rslora=true"], 16 / 4),
    ],
)
def test_factors_are_the_closest_to_the_error_of_each_weight(
    kind: str, also: list[str], scale: float, started: Callable[..., Any], llama: Path
) -> None:
    model = started("quantization=nf4", "adapter=loftq", *also)
    originals = dict(base_of(llama).named_modules())
    layers = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = originals[name].weight.detach()
        error = (weight - dequantised(weight, kind)).double().numpy()
        u, singular, v = np.linalg.svd(error)
        rank = layer.r["default"]
        a, b = (getattr(layer, part)["default"].weight.detach().double().numpy() for part in ("lora_A", "lora_B"))
        expected = (u[:, :rank] * singular[:rank]) @ v[:rank]
        np.testing.assert_allclose(scale * b @ a, expected, atol=1e-6)
        # Both factors are of one size: B'B and AA' are the same diagonal matrix
        np.testing.assert_allclose(b.T @ b, np.diag(singular[:rank]) / scale, atol=1e-6)
        np.testing.assert_allclose(a @ a.T, np.diag(singular[:rank]) / scale, atol=1e-6)


def test_adapted_base_is_closer_to_the_model_before_quantisation(started: Callable[..., Any], llama: Path) -> None:
    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=TOKENS).logits

    full = logits(base_of(llama))
    ranks = {r: logits(started("quantization=nf4", "adapter=loftq", f"adapter.r={r}")) for r in (16, 48)}
    plain = logits(started("quantization=nf4", "adapter.r=16"))
    errors = [float((each - full).square().mean()) for each in (plain, ranks[16], ranks[48])]
    assert errors[0] > errors[1] > errors[2] > 0


def test_rank_above_the_weights_dimensions_is_filled_with_zeros() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 5)
    a, b = closest_factors(matrix, 7, 2.0)
    assert (a.shape, b.shape) == ((7, 5), (3, 7))
    torch.testing.assert_close(2.0 * b @ a, matrix)


def test_run_is_opened_exported_and_resumed_on_the_quantised_base(
    cli: Callable[..., Finished], llama: Path, rows: Path, tmp_path: Path
) -> None:
    model = ["model=hub", f"model.path={llama}", "data=jsonl", f"data.train={rows}", "task.samples=0"]
    command = [*model, "adapter=loftq", "quantization=nf4", "hydra.run.dir=run", "trainer.save_steps=2"]
    finished = cli(*command, "trainer.max_steps=2")
    assert finished.status == 0, finished.err
    assert "LoftQ: A and B remove" in finished.out
    stored = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (stored["init_lora_weights"], stored["r"]) == (True, 8), "plain LoRA, which PEFT loads without a start"
    opened, _ = load_run(open_run("run"))
    assert stored_adapter("run").config.r == 8
    file = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    assert torch.equal(dict(opened.named_parameters())[f"{name}.default.weight"], file[f"{name}.weight"])

    refused = cli("export", "run", "to=adapter", "target=vllm")
    assert (refused.status, "fits only the base as it was quantised" in refused.err) == (1, True), refused.err
    assert cli("export", "run", "to=merged").status == 0
    assert cli("export", "run", "to=kept", "target=hf").status == 0
    assert "BitsAndBytesConfig" in (tmp_path / "kept/README.md").read_text()

    resumed = cli("resume", "run", "trainer.max_steps=3")
    assert (resumed.status, "from step 2" in resumed.out) == (0, True), resumed.err
    assert "LoftQ" not in resumed.out, "the checkpoint has the factors"


def test_start_is_known_without_weights(compose: Callable[..., Any], llama: Path, started: Callable[..., Any]) -> None:
    config = compose("model=hub", f"model.path={llama}", "adapter=loftq", "quantization=nf4")
    records = plan_on_meta(config)[1].records
    values = dict(started("adapter=loftq", "quantization=nf4").named_parameters())
    assert all(values[record.name].any() for record in records)
    assert not any(record.starts_at_zero for record in records)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], ["4-bit weights, which the base model doesn't have. PEFT's loftq would round", "use quantization=nf4"]),
        (["quantization=int8"], ["4-bit weights, which the base model doesn't have; use quantization=nf4"]),
        (["quantization=nf4", "+adapter.use_dora=true"], ["adapter.use_dora: PEFT computes DoRA's magnitudes"]),
        (["quantization=nf4", "+adapter.loftq_config={loftq_iter: 5}"], ["adapter.loftq_config: it would have no"]),
        (
            ["quantization=nf4", "+trainer.fsdp=full_shard", "+trainer.deepspeed={zero_optimization: {stage: 3}}"],
            ["trainer.fsdp: may split the base model, and loftq needs", "trainer.deepspeed: may split"],
        ),
        (["adapter._target_=peft.AdaLoraConfig", "quantization=nf4"], ["a start of plain LoRA, and adapter._target_"]),
    ],
)
def test_what_loftq_cannot_do_is_refused_before_the_weights(
    overrides: list[str], told: list[str], cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, "adapter=loftq", *overrides)
    assert ended.status == 1
    assert all(each in ended.err for each in told), ended.err


def test_quantised_checkpoint_has_no_error_to_start_from(
    llama: Path, rows: Path, compose: Callable[..., Any], tmp_path: Path
) -> None:
    from loraplus_hydra.errors import ConfigErrors
    from loraplus_hydra.models.base_model import load_model
    from loraplus_hydra.models.quantization import quantization_config
    from tests.models.test_model import CAUSAL_LM, model_group

    group = compose("quantization=nf4").quantization
    assert quantization_config(group) is not None
    quantised = load_model(model_group(llama), CAUSAL_LM, quantization=group)
    quantised.save_pretrained(tmp_path / "quantised")
    load_tokenizer(model_group(llama)).save_pretrained(tmp_path / "quantised")
    overrides = ["model=hub", f"model.path={tmp_path / 'quantised'}", "data=jsonl", f"data.train={rows}"]
    with pytest.raises(ConfigErrors, match="loftq needs the weights before quantisation"):
        run(compose(*overrides, "adapter=loftq", "quantization=nf4", "task.samples=0"), tmp_path / "run")
