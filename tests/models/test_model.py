"""Base models: named ones from their YAML, folders, pad tokens, new tokens, and unavailable settings."""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.io.quiet_libraries import quiet_new_head
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.base_model import hub_arguments, load_model, match_tokenizer, meta_model
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs import export_check
from tests.conftest import Finished
from tests.support.architectures import CAUSAL, checkpoint, config_of, one_of_each_architecture, tokenizer

CAUSAL_LM, SEQ_CLS, ENCODER = (
    f"transformers.AutoModel{kind}" for kind in ("ForCausalLM", "ForSequenceClassification", "")
)
# Parameters as published (model cards, papers), of the causal model or of the encoder with its pooler.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "bert_base": 109_482_240,
    "roberta_base": 124_645_632,
    "minilm": 22_713_216,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,  # PEFT's benchmark counts 3,221,924,864 with an adapter of 9,175,040
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama2_7b": 6_738_415_616,
    "mistral_7b": 7_248_023_552,
    "gemma_2b": 2_506_172_416,
}
NAMED = sorted(path.stem for path in (config_folder() / "model").glob("*.yaml") if path.stem not in ("hub", "embedded"))


def model_group(path: Path, **changes: Any) -> DictConfig:
    """Return a `model` group for a folder, with the schema's defaults."""
    from omegaconf import OmegaConf

    from loraplus_hydra.config.schema import ModelConfig

    group = OmegaConf.structured(ModelConfig(path=str(path)))
    for name, value in changes.items():
        group[name] = value
    return group


def is_encoder(config: DictConfig) -> bool:
    return config.model.config.model_type in ("bert", "roberta")


def test_every_named_model_has_its_published_size_here() -> None:
    assert set(NAMED) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMED)
def test_named_model_builds_with_its_published_parameters_and_no_network(
    name: str, compose: Callable[..., DictConfig]
) -> None:
    config = compose(f"model={name}")
    model = meta_model(config.model, ENCODER if is_encoder(config) else CAUSAL_LM)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("targets", ["all-linear", "null"])
@pytest.mark.parametrize("name", one_of_each_architecture(NAMED))
def test_all_linears_or_the_architectures_own_targets_are_adapted(
    name: str, targets: str, compose: Callable[..., DictConfig]
) -> None:
    config = compose(f"model={name}", f"adapter.target_modules={targets}")
    encoder = is_encoder(config)
    model = meta_model(config.model, SEQ_CLS if encoder else CAUSAL_LM)
    adapted = add_adapter(model, config.adapter, "SEQ_CLS" if encoder else "CAUSAL_LM", on_meta=True)
    kinds = {key.split(".")[-4] for key, p in adapted.named_parameters() if "lora_A" in key and p.requires_grad}
    assert not kinds & {"lm_head", "classifier", "score"}
    blocks = {
        "gpt2": ({"c_attn", "c_proj", "c_fc"}, {"c_attn"}),
        "bert": ({"query", "key", "value", "dense"}, {"query", "value"}),
        "gemma": ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, {"q_proj", "v_proj"}),
    }
    family = {"gpt2": "gpt2", "bert": "bert", "roberta": "bert"}.get(config.model.config.model_type, "gemma")
    assert kinds == blocks[family][0 if targets == "all-linear" else 1]


def test_a_missing_model_is_one_clear_problem(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    data = [override for override in tiny_run if override.startswith("data")]
    for command in ((), ("check",)):
        ended = cli(*command, "model=hub", "model.path=nobody/nothing", *data, "hydra.run.dir=run")
        assert ended.status == 1
        assert ended.err.startswith("1 error:\n  - model.path: ")
        assert ended.err.count("\n") == 2
        assert "nobody/nothing" in ended.err
        assert "Traceback" not in ended.err
        assert not Path("run").exists()


def test_folder_without_a_model_hides_no_other_mistake(cli: Callable[..., Finished], tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    ended = cli("check", "model=hub", f"model.path={tmp_path}", "adapter.r=0")
    assert "model.path: " in ended.err
    assert "adapter.r: 0 is out of range" in ended.err


@pytest.mark.parametrize(
    ("address", "proxies", "only"),
    [(False, {}, True), (True, {}, None), (False, {"https": "http://proxy"}, None)],
)
def test_a_hub_without_an_address_gets_no_request(
    address: bool, proxies: dict[str, str], only: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(host: str, port: None) -> list[str]:
        assert host == "huggingface.co"
        if not address:
            raise socket.gaierror(-2, "Name or service not known")
        return [host]

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    monkeypatch.setattr("socket.getaddrinfo", look_up)
    assert hub_arguments(model_group(Path("nobody/nothing")), "nobody/nothing").get("local_files_only") is only


@pytest.mark.parametrize("revision", [None, "abc123"])
@pytest.mark.parametrize("base", ["org/base", "FOLDER"])
@pytest.mark.parametrize("own", [None, "other/tok", "FOLDER/tok"])
def test_a_tokenizer_is_searched_for_where_it_is_itself(
    own: str | None, base: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tok").mkdir()
    base, own = base.replace("FOLDER", str(tmp_path)), own and own.replace("FOLDER", str(tmp_path))
    asked: list[tuple[str, dict[str, Any]]] = []

    def loaded(path: str, *_: Any, **settings: Any) -> Any:
        asked.append((path, settings))
        return tokenizer()

    monkeypatch.setattr("loraplus_hydra.models.base_model._hub_has_no_address", lambda: False)
    monkeypatch.setattr("loraplus_hydra.models.tokenizer.AutoTokenizer.from_pretrained", loaded)
    monkeypatch.setattr(
        "loraplus_hydra.runs.export_check.cached_file", lambda *words, **settings: loaded(*words, **settings) and None
    )
    model = model_group(Path(base), tokenizer=own, revision=revision)
    load_tokenizer(model)
    assert export_check._sentencepiece(model) is None
    for path, settings in asked:
        assert path == (own or base)
        assert settings.get("revision") == (revision if own is None else None)
        assert settings.get("local_files_only", False) == str(path).startswith("/")
    assert len(asked) == 2


def test_tries_to_reach_the_hub_are_not_on_the_screen() -> None:
    code = (
        "from loraplus_hydra.io.quiet_libraries import quiet_libraries; quiet_libraries()\n"
        "from huggingface_hub.utils import logging\n"
        "logging.get_logger('huggingface_hub.utils._http').warning('Retrying in 1s')\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_missing_weights_are_a_config_error(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    config_of("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigErrors, match=r"model\.path"):
        load_model(model_group(tmp_path), CAUSAL_LM)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigErrors, match="safetensors"):
        load_model(model_group(tmp_path), CAUSAL_LM)


def test_named_model_with_another_checkpoint_is_refused(tmp_path: Path, compose: Callable[..., DictConfig]) -> None:
    checkpoint("gpt2", tmp_path)
    config = compose("model=gpt2", f"model.path={tmp_path}")
    for build in (meta_model, load_model):
        with pytest.raises(ConfigErrors) as refused:
            build(config.model, CAUSAL_LM)
        wrong = {problem.key for problem in refused.value.problems}
        assert wrong == {f"model.config.{key}" for key in ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions")}


def test_encoder_is_refused_as_a_causal_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match="encoder"):
        meta_model(model_group(checkpoint("bert", tmp_path)), CAUSAL_LM)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_causal_classifier_judges_a_text_alike_alone_and_padded(architecture: str, tmp_path: Path) -> None:
    checkpoint(architecture, tmp_path, pad_token=None)
    group = model_group(tmp_path)
    padding = load_tokenizer(group)
    model = load_model(group, SEQ_CLS, {"num_labels": 3})
    match_tokenizer(model, padding)
    model.eval()
    texts = ["say one", "say one two three four"]
    with torch.no_grad():
        together = model(**padding(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**padding(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_report_on_loading_is_shown_unless_only_a_head_is_new(
    tiny_model: Path, compose: Callable[..., DictConfig], caplog: pytest.LogCaptureFixture
) -> None:
    model = compose("model=hub", f"model.path={tiny_model}").model
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        load_model(model, "transformers.AutoModelForSequenceClassification")
        assert "LOAD REPORT" not in caplog.text
        with quiet_new_head(("another",)):
            AutoModelForSequenceClassification.from_pretrained(tiny_model)
        assert "score.weight" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_head_for_other_labels_is_replaced(tmp_path: Path) -> None:
    checkpoint("bert", tmp_path, num_labels=5)
    model = load_model(model_group(tmp_path), SEQ_CLS, {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}})
    assert model.classifier.weight.shape[0] == 3
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.attention=flash_attention_2", "model.attention: 'flash_attention_2' needs the package flash-attn"),
        ("model.attention=sdqa", "model.attention: there is no attention 'sdqa' (did you mean 'sdpa'?)"),
        ("model.attention=kernels/flash", "model.attention: 'kernels/flash' is code from a hub"),
        ("model.dtype=float8", "model.dtype: 'float8' is out of range"),
    ],
)
def test_unavailable_attention_and_dtypes_are_reported(
    override: str, message: str, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, override)
    assert ended.status == 1
    assert message in ended.err


def test_compiling_without_a_compiler_is_reported(
    cli: Callable[..., Finished], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def none_here() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none_here)
    ended = cli("check", *tiny_run, "trainer.torch_compile=true")
    assert "trainer.torch_compile: compiling needs a C++ compiler" in ended.err


def test_bfloat16_on_a_gpu_without_it_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loraplus_hydra.check.machine import machine_problems

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    (problem,) = machine_problems({"model": {"dtype": "bfloat16"}})
    assert problem.key == "model.dtype"
    assert not machine_problems({"model": {"dtype": "bfloat16"}, "trainer": {"use_cpu": True}})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_attention_and_dtype_are_the_configs(attention: str, dtype: str, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path)
    model = load_model(model_group(tmp_path, attention=attention, dtype=dtype), CAUSAL_LM)
    assert model.dtype is {"auto": torch.float32}.get(dtype, getattr(torch, dtype, None))
    assert model.config._attn_implementation == attention
    logits = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    assert math.isfinite(logits.float().sum().item())


@pytest.mark.parametrize("architecture", [*CAUSAL, "bert", "roberta"])
def test_activation_checkpointing_leaves_every_gradient_as_it_is(
    architecture: str, tmp_path: Path, compose: Callable[..., Any]
) -> None:
    """The Trainer switches it on; the base's embedding, the first layer's input, is frozen."""
    checkpoint(architecture, tmp_path)
    causal = architecture in CAUSAL
    gradients = []
    for recompute in (False, True):
        base = load_model(model_group(tmp_path), CAUSAL_LM if causal else SEQ_CLS)
        torch.manual_seed(0)
        model = add_adapter(base, compose("adapter=lora_a_zero").adapter, "CAUSAL_LM" if causal else "SEQ_CLS")
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        tokens = torch.arange(3, 35).reshape(2, 16)
        torch.manual_seed(0)
        model(input_ids=tokens, labels=tokens if causal else torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    moved = [gradient for name, gradient in gradients[0].items() if "lora_A" in name]
    assert moved
    assert all(gradient.abs().max() > 0 for gradient in moved)


def test_plain_transformers_loads_what_was_built_for_these_tests(tmp_path: Path) -> None:
    checkpoint("roberta", tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.model_type == "roberta"
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<pad>"
