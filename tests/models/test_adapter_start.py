"""Every adapter starts as its base, and its files fit that base."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from loraplus_hydra import run
from loraplus_hydra.check.starts import start_problems
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.adapter_files import save_adapter
from loraplus_hydra.models.base_model import load_base
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.training.prepare import plan_on_meta
from tests.conftest import Finished
from tests.support.architectures import CAUSAL, TOKENS, base_of, tokenizer

OPTIONS = ("lora", "rslora", "dora", "eva", "pissa", "olora", "lora_a_zero", "lora_embeddings", "adalora", "vera")


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def train(model: Any, steps: int = 3, causal: bool = True) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS if causal else torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


SOME = {"llama": OPTIONS, "gpt2": ("lora", "olora", "lora_embeddings", "vera"), "roberta": ("pissa", "adalora")}


@pytest.mark.parametrize(
    ("architecture", "option"),
    [
        pytest.param(architecture, option, marks=[] if option in SOME[architecture] else pytest.mark.slow)
        for architecture in SOME
        for option in OPTIONS
    ],
)
def test_adapter_starts_as_the_base_and_its_file_is_right_on_the_base(
    architecture: str, option: str, checkpoints: Any, tmp_path: Path, compose: Callable[..., DictConfig]
) -> None:
    folder, causal = checkpoints(architecture), architecture in CAUSAL
    config = compose(f"adapter={option}", "loraplus=roles")
    torch.manual_seed(0)
    if (architecture, option) == ("gpt2", "olora"):
        for on_meta in (True, False):
            with pytest.raises(ConfigErrors, match="doesn't support the Conv1D layers"):
                add_adapter(base_of(folder, architecture), config.adapter, "CAUSAL_LM", on_meta=on_meta)
        return
    before = logits(base_of(folder, architecture))
    model = add_adapter(base_of(folder, architecture), config.adapter, "CAUSAL_LM" if causal else "SEQ_CLS")
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    train(model, causal=causal)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-5
    save_adapter(model, tokenizer(), tmp_path)
    again = logits(PeftModel.from_pretrained(base_of(folder, architecture), tmp_path))
    if option in ("pissa", "olora"):  # the residual base was rounded
        torch.testing.assert_close(again, trained, atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(again, trained)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    if stored["peft_type"] == "LORA":
        assert stored["init_lora_weights"] in (True, False), "a plain LoRA, whatever it started from"
        assert not any("embed_tokens.base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_conversion_equals_pefts_own(start: str, use_rslora: bool, checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints("llama")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=start, use_rslora=use_rslora)
    model = get_peft_model(base_of(folder), config)
    model.save_pretrained(tmp_path / "initial")
    train(model)
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))

    adapter = OmegaConf.create(
        {
            "_target_": "peft.LoraConfig",
            "r": 4,
            "target_modules": "all-linear",
            "init_lora_weights": start,
            "use_rslora": use_rslora,
        }
    )
    ours = add_adapter(base_of(folder), adapter, None)
    train(ours)
    save_adapter(ours, tokenizer(), tmp_path / "ours")
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora", "target_modules"):
        one, other = (sorted(c[key]) if isinstance(c[key], list) else c[key] for c in configs)
        assert one == other, key


@pytest.mark.parametrize(
    "keys",
    [
        {"r": 80},  # the layers have sides of 32, 64 and 128
        {"r": 80, "rank_pattern": {"k_proj": 48, "q_proj": 4}, "alpha_pattern": {"q_proj": 3}},
        {"r": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 6}},
        {"r": 80, "target_modules": ["k_proj", "embed_tokens"], "use_rslora": True},
    ],
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_converted_file_fits_the_base_whatever_the_rank_and_the_layers(
    start: str, keys: dict[str, Any], checkpoints: Any, tmp_path: Path
) -> None:
    adapter = {"_target_": "peft.LoraConfig", "target_modules": "all-linear", "init_lora_weights": start, **keys}
    torch.manual_seed(0)
    model = add_adapter(base_of(checkpoints("llama")), adapter, "CAUSAL_LM")
    train(model)
    trained = logits(model)
    assert (trained - logits(base_of(checkpoints("llama")))).abs().max() > 1e-4
    save_adapter(model, tokenizer(), tmp_path)
    again = logits(PeftModel.from_pretrained(base_of(checkpoints("llama")), tmp_path))
    torch.testing.assert_close(again, trained, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),  # tied to the embedding
        ("llama", {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}),
    ],
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_start_that_would_change_another_layers_weight_is_refused(
    start: str, architecture: str, keys: dict[str, Any], checkpoints: Any
) -> None:
    """PEFT changes a layer's weight in place, so the model would start as another one than its base."""
    adapter = {"_target_": "peft.LoraConfig", "r": 4, "init_lora_weights": start, **keys}
    base = base_of(checkpoints(architecture), architecture)
    with torch.device("meta"):
        on_meta = type(base)(base.config)
    for model in (on_meta, base):
        with pytest.raises(ConfigErrors, match="which is also the weight of"):
            add_adapter(model, adapter, "CAUSAL_LM", on_meta=model is on_meta)


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["q_proj", "embed_tokens"]])
def test_factors_that_share_memory_at_two_rates_are_refused(
    targets: list[str], checkpoints: Any, compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"r": 4, "target_modules": targets, "ensure_weight_tying": True}
    peft = get_peft_model(base_of(checkpoints("qwen2"), "qwen2"), LoraConfig(task_type="CAUSAL_LM", **keys))
    names = {name: tensor for name, tensor in peft.named_parameters() if tensor.requires_grad}
    (of_head,) = (tensor for name, tensor in names.items() if "lm_head.lora_A" in name)
    (of_embedding,) = (tensor for name, tensor in names.items() if "lora_embedding_B" in name)
    assert of_head is not of_embedding
    assert of_head.data_ptr() == of_embedding.data_ptr(), "otherwise PEFT has changed, and they may be tied"

    peft.save_pretrained(tmp_path)
    base = base_of(checkpoints("qwen2"), "qwen2")
    with torch.device("meta"):
        on_meta = type(base)(base.config)
    for adapter in ({"_target_": "peft.LoraConfig", **keys}, {"path": str(tmp_path)}):
        for model in (copy.deepcopy(on_meta), copy.deepcopy(base)):
            with pytest.raises(ConfigErrors, match=r"adapter\.ensure_weight_tying: .*one tensor with two rates"):
                add_adapter(model, adapter, "CAUSAL_LM", on_meta=model.device.type == "meta")


@pytest.mark.parametrize(("architecture", "target"), [("llama", "lm_head"), ("qwen2", "embed_tokens")])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_start_that_changes_no_shared_weight_equals_the_base(
    start: str, architecture: str, target: str, checkpoints: Any
) -> None:
    """PEFT starts an embedding in the usual way, so the weight of a tied one stays as it is."""
    before = logits(base_of(checkpoints(architecture), architecture))
    adapter = {
        "_target_": "peft.LoraConfig",
        "r": 4,
        "init_lora_weights": start,
        "target_modules": ["q_proj", target],
    }
    model = add_adapter(base_of(checkpoints(architecture), architecture), adapter, "CAUSAL_LM")
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)


def test_conversion_keeps_a_classifiers_head(checkpoints: Any, tmp_path: Path, compose: Callable[..., Any]) -> None:
    model = add_adapter(base_of(checkpoints("bert"), "bert"), compose("adapter=pissa").adapter, "SEQ_CLS")
    train(model, causal=False)
    save_adapter(model, tokenizer(), tmp_path)
    fresh = base_of(checkpoints("bert"), "bert")
    torch.nn.init.normal_(fresh.classifier.weight)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, tmp_path)), logits(model), atol=2e-6, rtol=1e-5)


def test_a_zero_is_the_reverse_of_pefts_start(checkpoints: Any, compose: Callable[..., DictConfig]) -> None:
    def start(seed: int, *overrides: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = add_adapter(base_of(checkpoints("llama")), compose(*overrides, "adapter.r=16").adapter, "CAUSAL_LM")
        return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

    reverse = start(0, "adapter=lora_a_zero")
    a = [tensor for name, tensor in reverse.items() if ".lora_A." in name]
    b = torch.cat([tensor.flatten() for name, tensor in reverse.items() if ".lora_B." in name])
    assert all((tensor == 0).all() for tensor in a)
    # Uniform within 1 / sqrt(r): that is its deviation, and no number is outside.
    assert b.abs().max() <= 1 / math.sqrt(16)
    assert b.std().item() == pytest.approx(1 / math.sqrt(3 * 16), rel=0.02)
    again, other = start(0, "adapter=lora_a_zero"), start(1, "adapter=lora_a_zero")
    assert all(torch.equal(reverse[name], again[name]) for name in reverse)
    assert not all(torch.equal(reverse[name], other[name]) for name in reverse)
    by_key = start(0, "adapter.init_lora_weights=a_zero")
    assert all(torch.equal(reverse[name], by_key[name]) for name in reverse)


@pytest.mark.parametrize(
    "also", [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_a_zero_starts_as_the_base_whatever_else_the_adapter_has(also: dict[str, Any], checkpoints: Any) -> None:
    adapter = {"_target_": "peft.LoraConfig", "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "a_zero"}
    model = add_adapter(base_of(checkpoints("llama")), {**adapter, **also}, "CAUSAL_LM")
    torch.testing.assert_close(logits(model), logits(base_of(checkpoints("llama"))), atol=1e-6, rtol=1e-5)


def test_a_zero_starts_each_expert_like_a_layer_of_its_own() -> None:
    """PEFT keeps the experts' factors in one matrix, whose inner side is rank x experts."""
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=16, **settings)
    adapter = {
        "_target_": "peft.LoraConfig",
        "r": 4,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "init_lora_weights": "a_zero",
    }
    torch.manual_seed(0)
    model = add_adapter(MixtralForCausalLM(experts), adapter, "CAUSAL_LM")
    of_experts = [p for name, p in model.named_parameters() if "experts" in name and ".lora_B." in name]
    assert len(of_experts) == 2
    for b in of_experts:  # uniform within 1 / sqrt(r)
        assert b.abs().max() <= 1 / math.sqrt(4)
        assert b.std().item() == pytest.approx(1 / math.sqrt(3 * 4), rel=0.05)


def test_embeddings_join_all_linears_whatever_they_are_called(checkpoints: Any, compose: Callable[..., Any]) -> None:
    adapter = compose("adapter=lora_embeddings").adapter
    for architecture, name in (("llama", "embed_tokens"), ("gpt2", "wte"), ("bert", "word_embeddings")):
        model = add_adapter(base_of(checkpoints(architecture), architecture), adapter, None)
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert {key.split(".")[-3] for key in trained if "lora_embedding_A" in key} == {name}
        assert any("lora_A" in key for key in trained)
        assert not any("lm_head" in key for key in trained)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
@pytest.mark.parametrize("name", ["experts.down_proj", "k_proj.weight"])
def test_starts_from_a_layers_weight_are_refused_for_the_parameters_that_peft_refuses(start: str, name: str) -> None:
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **settings))
    adapter: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": [name], "init_lora_weights": start}
    problems = start_problems(LoraConfig, {"adapter": adapter})
    try:
        get_peft_model(model, LoraConfig(r=2, **adapter))
        assert problems == []
    except AttributeError:
        (problem,) = problems
        assert problem.key == "adapter.target_parameters"
        assert f"'{name}' is a parameter" in problem.what


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_starts_that_need_more_than_a_config_are_refused(
    start: str, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, f"adapter.init_lora_weights={start}")
    assert ended.status == 1
    assert f"adapter.init_lora_weights: '{start}' isn't supported" in ended.err


def test_vera_needs_a_preset_that_splits_it(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    ended = cli("check", *tiny_run, "adapter=vera")
    assert ended.status == 1
    assert "loraplus=roles" in ended.err
    assert cli("check", *tiny_run, "adapter=vera", "loraplus=roles").status == 0


def test_any_other_method_of_peft_goes_by_its_class(
    tiny_run: list[str], compose: Callable[..., DictConfig], tmp_path: Path, tiny_model: Path
) -> None:
    overrides = ["adapter._target_=peft.LoHaConfig", "~adapter.lora_alpha", "~adapter.lora_dropout", "~adapter.bias"]
    overrides += ["~adapter.init_lora_weights", "loraplus=none", "trainer.max_steps=2", "task.samples=0"]
    result = run(compose(*tiny_run, *overrides), tmp_path / "run")
    assert result.steps == 2
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run" / "adapter")
    assert model.active_peft_config.peft_type == "LOHA"


@pytest.mark.parametrize(
    "adapter", ["lora", "dora", "eva", "olora", "adalora", "vera", "lora_embeddings", "lora_a_zero"]
)
def test_the_same_tensors_train_on_the_meta_device(adapter: str, tiny_model: Path, compose: Callable[..., Any]) -> None:
    config = compose("model=hub", f"model.path={tiny_model}", f"adapter={adapter}", "loraplus=roles")
    base = load_base(config, load_tokenizer(config.model), {})
    real = tensor_records(add_adapter(base, config.adapter, config.task.task_type))
    on_meta = tensor_records(plan_on_meta(config)[0])
    assert [(each.name, each.role, each.shape) for each in on_meta] == [
        (each.name, each.role, each.shape) for each in real
    ]
