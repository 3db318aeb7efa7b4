"""QLoRA on a CPU: nf4 and int8 train and evaluate; the base stays unchanged and the adapter float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loraplus_hydra import run
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.loraplus.memory import estimate
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.base_model import load_model
from loraplus_hydra.models.quantization import quantization_config
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.training.prepare import plan_on_meta
from tests.conftest import Finished
from tests.models.test_model import CAUSAL_LM, model_group
from tests.support.architectures import checkpoint

TOKENS = torch.arange(3, 51).reshape(4, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("llama"))


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of every frozen tensor, packed ones as they are, and the scales of 4-bit ones."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            found[name] = parameter.detach().clone()
            if getattr(parameter, "quant_state", None) is not None:
                found[f"{name}.absmax"] = parameter.quant_state.absmax.clone()
    return found


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_run_trains_and_its_adapter_gives_its_logits_again(
    kind: str, llama: Path, rows: Path, tmp_path: Path, compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.runs import job

    trainers = []
    make_trainer = job.make_trainer
    monkeypatch.setattr(job, "make_trainer", lambda *a: trainers.append(make_trainer(*a)) or trainers[-1])
    overrides = ["model=hub", f"model.path={llama}", f"quantization={kind}", "data=jsonl", f"data.train={rows}"]
    config = compose(*overrides, "trainer.max_steps=4", "trainer.eval_steps=2", "optimizer.lr=1e-3", "task.samples=0")
    result = run(config, tmp_path / "run")
    assert result.value is not None
    assert result.value < result.metrics_before["eval_loss"]
    (trainer,) = trainers
    model = trainer.model.eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    state = trainer.optimizer.state
    assert {tensor.dtype for one in state.values() for tensor in one.values() if tensor.ndim} == {torch.float32}
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits

    quantised = load_model(config.model, CAUSAL_LM, quantization=config.quantization)
    untouched = frozen(quantised)
    now = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in frozen(model).items()}
    assert untouched.keys() == now.keys()
    assert all(torch.equal(untouched[name], now[name]) for name in untouched), "the base has changed"
    plain = PeftModel.from_pretrained(quantised, tmp_path / "run" / "adapter").eval()
    reopened, _ = load_run(open_run(str(tmp_path / "run")))
    for again in (plain, reopened):
        with torch.no_grad():
            assert torch.equal(again(input_ids=TOKENS).logits, expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_changes_no_gradient(kind: str, llama: Path, compose: Callable[..., Any]) -> None:
    """bitsandbytes repacks 4-bit weights in the first evaluation on some CPUs, and loses the gradient with it."""
    config = compose(f"quantization={kind}", "adapter=lora_a_zero")
    torch.manual_seed(0)
    base = load_model(model_group(llama), CAUSAL_LM, quantization=config.quantization)
    model = add_adapter(base, config.adapter, "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=0.02)

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=TOKENS)
    after = gradients()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("adapter", ["dora", "vera", "adalora", "lora_embeddings"])
def test_other_adapters_train_on_four_bits(adapter: str, llama: Path, compose: Callable[..., Any]) -> None:
    config = compose("quantization=nf4", f"adapter={adapter}", "loraplus=roles")
    base = load_model(model_group(llama), CAUSAL_LM, quantization=config.quantization)
    model = add_adapter(base, config.adapter, "CAUSAL_LM")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "llama"])
def test_a_classifiers_new_head_is_not_quantised(
    architecture: str, tmp_path: Path, compose: Callable[..., Any]
) -> None:
    checkpoint(architecture, tmp_path)
    config = compose("quantization=nf4")
    auto = "transformers.AutoModelForSequenceClassification"
    base = load_model(model_group(tmp_path), auto, {"num_labels": 3}, quantization=config.quantization)
    model = add_adapter(base, config.adapter, "SEQ_CLS")
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert head
    assert {p.dtype for p in head} == {torch.float32}
    assert any(type(p).__name__ == "Params4bit" for p in model.parameters())


def test_four_bit_weights_compute_in_the_models_dtype(compose: Callable[..., Any]) -> None:
    for dtype, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        config = compose("quantization=nf4", f"model.dtype={dtype}")
        assert quantization_config(config.quantization).bnb_4bit_compute_dtype is expected
    config = compose("quantization=nf4", "model.dtype=auto")
    assert quantization_config(config.quantization, torch.bfloat16).bnb_4bit_compute_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["quantization=nf4", "adapter=pissa"],
            "adapter.init_lora_weights: 'pissa' is computed from the base's weights",
        ),
        (
            ["quantization=int8", "adapter=olora"],
            "adapter.init_lora_weights: 'olora' is computed from the base's weights",
        ),
        (["quantization=nf4", "+quantization.bnb_4bit_quant_tipe=fp4"], "(did you mean 'bnb_4bit_quant_type'?)"),
        (["quantization=nf4", "quantization.bnb_4bit_compute_dtype=floaty"], "quantization"),
        (
            ["+quantization.load_in_8bit=true", "quantization._target_=torch.load"],
            "quantization._target_: 'torch.load' is",
        ),
    ],
)
def test_wrong_quantisation_is_reported(
    overrides: list[str], message: str, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, *overrides)
    assert ended.status == 1
    assert message in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="works on a GPU")
def test_dora_on_eight_bits_is_refused_on_a_cpu(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    ended = cli("check", *tiny_run, "quantization=int8", "adapter=dora")
    assert "adapter.use_dora: PEFT can't compute the norms of 8-bit weights on a CPU" in ended.err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["+adapter.modules_to_save=[lm_head]"],
        ["+quantization.llm_int8_skip_modules=[q_proj,model.layers.1.mlp]"],
        ["+quantization.llm_int8_skip_modules=[down_proj]", "+adapter.modules_to_save=[lm_head]"],
    ],
)
def test_estimated_weights_are_those_that_are_loaded(
    kind: str, overrides: list[str], llama: Path, compose: Callable[..., Any]
) -> None:
    config = compose("model=hub", f"model.path={llama}", f"quantization={kind}", *overrides)
    estimated = estimate(*plan_on_meta(config), plain_of(config.quantization)).weights

    base = load_model(config.model, CAUSAL_LM, quantization=config.quantization)
    model = add_adapter(base, config.adapter, "CAUSAL_LM")

    assert estimated == pytest.approx(frozen_bytes(model), rel=0.01)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_estimate_counts_gpt2_s_layers_quantised(kind: str, tmp_path: Path, compose: Callable[..., Any]) -> None:
    """They are transformers' Conv1D."""
    checkpoint("gpt2", tmp_path)
    test_estimated_weights_are_those_that_are_loaded(kind, [], tmp_path, compose)


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
def test_the_estimate_counts_a_classifier_s_head_unquantised(
    architecture: str, tmp_path: Path, compose: Callable[..., Any]
) -> None:
    checkpoint(architecture, tmp_path)
    config = compose("model=hub", f"model.path={tmp_path}", "quantization=nf4", "task=classification")
    meta, plan = plan_on_meta(config)
    estimated = estimate(meta, plan, plain_of(config.quantization)).weights

    labels = {"num_labels": meta.config.num_labels}
    base = load_model(config.model, config.task.auto_class, labels, quantization=config.quantization)
    model = add_adapter(base, config.adapter, "SEQ_CLS")

    assert estimated == pytest.approx(frozen_bytes(model), rel=0.01)


def frozen_bytes(model: torch.nn.Module) -> int:
    """Bytes of the frozen weights as they are loaded, with their scales."""
    tensors = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        tensors += [parameter, getattr(state, "absmax", None), getattr(nested, "absmax", None)]
        tensors.append(getattr(parameter, "SCB", None))  # the scales of 8-bit weights
    return sum(each.numel() * each.element_size() for each in tensors if each is not None)
