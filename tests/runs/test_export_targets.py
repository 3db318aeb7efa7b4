"""What the targets of `export` load: adapters that PEFT itself wrote, against each target's published limits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loraplus_hydra.errors import Problem
from loraplus_hydra.runs import export_architectures as known
from loraplus_hydra.runs.export_targets import TARGETS, VLLM_RANKS, Export, problems, smallest_max_lora_rank
from tests.support.architectures import CAUSAL, config_of

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED = {"tie_word_embeddings": True}


def lora(r: int = 4, **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, **{"target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})


# name -> architecture, changes of its config, adapter, and per target the reason for a refusal (missing: accepted)
NOT_LORA = "loads adapters of LoRA only, and this one is "
NO_SCALE = {
    "llama_cpp": "llama.cpp scales an adapter by lora_alpha / r",
    "ollama": "scales an adapter by lora_alpha / r",
}
TIED_OUTPUT = "embedding and output layer are one (tied), and llama.cpp can't adapt "


def everywhere(reason: str) -> dict[str, str]:
    return dict.fromkeys(("vllm", "llama_cpp", "ollama"), reason)


ADAPTERS: dict[str, tuple[str, dict[str, Any], peft.PeftConfig, dict[str, str]]] = {
    "rank 4": ("llama", {}, lora(), {}),
    "rank 64": ("mistral", {}, lora(64), {}),
    "rank 600": ("llama", {}, lora(600), {"vllm": "largest max_lora_rank is 512, and the adapter has rank 600"}),
    "other ranks": ("llama", {}, lora(rank_pattern={"q_proj": 9}), {}),
    "other ranks, too large": ("llama", {}, lora(rank_pattern={"q_proj": 513}), {"vllm": "has rank 513"}),
    "rslora": ("llama", {}, lora(use_rslora=True), NO_SCALE),
    "other alphas": (
        *("llama", {}, lora(alpha_pattern={"q_proj": 32})),
        {"llama_cpp": "one lora_alpha for all layers", "ollama": "one lora_alpha for all layers"},
    ),
    "dora": ("llama", {}, lora(use_dora=True), everywhere("doesn't support DoRA (use_dora)")),
    "lora bias": ("llama", {}, lora(lora_bias=True), everywhere("a bias of lora_B (lora_bias)")),
    "biases": ("qwen2", {}, lora(bias="all"), everywhere("no trained biases (bias=all)")),
    "saved output": (
        *("llama", {}, lora(modules_to_save=["lm_head"])),
        everywhere("no trained copies of whole layers (modules_to_save: lm_head)"),
    ),
    "tokens": ("llama", {}, lora(trainable_token_indices=[5, 6]), everywhere("trained rows of single tokens")),
    "embedding": ("llama", {}, lora(target_modules=["q_proj", "embed_tokens"]), {}),
    "output": ("llama", {}, lora(target_modules=["q_proj", "lm_head"]), {}),
    "embedding, in vLLM's Mistral": (
        *("mistral", {}, lora(target_modules=["embed_tokens"])),
        {"vllm": "its MistralForCausalLM takes no LoRA on embed_tokens"},
    ),
    "tied embedding": (
        *("llama", TIED, lora(target_modules=["q_proj", "embed_tokens"])),
        {"llama_cpp": TIED_OUTPUT + "embed_tokens", "ollama": TIED_OUTPUT + "embed_tokens"},
    ),
    "tied output": (
        *("llama", TIED, lora(target_modules=["q_proj", "lm_head"])),
        {"llama_cpp": TIED_OUTPUT + "lm_head", "ollama": TIED_OUTPUT + "lm_head"},
    ),
    "gpt2": (
        *("gpt2", {}, lora(target_modules=["c_attn"], fan_in_fan_out=True)),
        {
            "vllm": "its GPT2LMHeadModel doesn't support LoRA",
            "llama_cpp": "isn't known that llama.cpp adapts all layers of GPT2LMHeadModel",
            "ollama": "isn't known that llama.cpp adapts all layers of GPT2LMHeadModel",
        },
    ),
    "ia3": (
        *("llama", {}, peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")),
        everywhere(NOT_LORA + "IA3"),
    ),
    "vera": (
        "llama",
        {},
        peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        everywhere("this one is VERA"),
    ),
    "prompt": (
        *("llama", {}, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
        everywhere(NOT_LORA + "PROMPT_TUNING"),
    ),
    "classifier": (
        *("bert", {}, lora(target_modules=["query"], task_type="SEQ_CLS")),
        {
            "vllm": "an adapter's classification head only for a base that has one",
            "llama_cpp": "only models that continue text are converted, and the task is SEQ_CLS",
            "ollama": "only models that continue text are converted, and the task is SEQ_CLS",
        },
    ),
}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """What PEFT writes for an adapter of ADAPTERS."""
    place, made = tmp_path_factory.mktemp("adapters"), dict[str, Export]()

    def describe(name: str) -> Export:
        if name not in made:
            made[name] = _described(name, place / name.replace(" ", "_"))
        return made[name]

    return describe


def _described(name: str, folder: Path) -> Export:
    architecture, changes, adapter, _ = ADAPTERS[name]
    config = config_of(architecture, **changes)
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSequenceClassification
    model = auto.from_config(config)
    kind = type(model).__name__
    peft.get_peft_model(model, adapter).save_pretrained(str(folder), save_embedding_layers=False)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    stored = json.loads((folder / "adapter_config.json").read_text())
    return Export(False, str(adapter.task_type), kind, config.to_dict(), stored, shapes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_accepted_or_refused_with_the_limit(
    name: str, target: str, described: Callable[[str], Export]
) -> None:
    found = problems(target, described(name))
    reason = ADAPTERS[name][3].get(target)
    if reason is None:
        assert found == []
        return
    assert any(reason in problem.what for problem in found), found
    assert all(problem.key == "target" and TARGETS[target] in problem.what for problem in found)
    for problem in found:
        _follow(problem, target, described(name))


def _follow(problem: Problem, target: str, export: Export) -> None:
    """The export that the advice names is loaded by the target that it names."""
    named = re.search(r"target=(\w+)", problem.fix)
    merged = re.search(r"merge=(true|false)", problem.fix)
    assert merged is not None, problem
    advised = replace(export, merged=merged[1] == "true")
    assert problems(named[1] if named else target, advised) == []


@pytest.mark.parametrize("name", [name for name, case in ADAPTERS.items() if "vllm" not in case[3]])
def test_vllm_finds_the_names_ranks_and_fields_that_it_reads(name: str, described: Callable[[str], Export]) -> None:
    export = described(name)
    factors = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, shape in export.shapes.items():
        match = factors.fullmatch(tensor)
        assert match is not None, tensor
        layers.setdefault(match[1], {})[match[2]] = shape
    allowed = smallest_max_lora_rank(export.rank)
    assert allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    ranks = {next(shape[0] for part, shape in pair.items() if "_A" in part) for pair in layers.values()}
    assert all(len(pair) == 2 for pair in layers.values())
    assert max(ranks) <= allowed
    assert {"r", "lora_alpha", "target_modules"} <= export.adapter.keys(), "vLLM's required fields"
    assert export.adapter["bias"] == "none"
    assert not export.adapter["modules_to_save"]
    assert not export.adapter["use_dora"]


@pytest.mark.parametrize("name", [name for name, case in ADAPTERS.items() if "llama_cpp" not in case[3]])
def test_llama_cpp_finds_pairs_of_factors_alone(name: str, described: Callable[[str], Export]) -> None:
    export = described(name)
    pairs: dict[str, set[str]] = {}
    for tensor in export.shapes:
        match = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", tensor)
        assert match is not None, tensor
        pairs.setdefault(match[1], set()).add(match[2])
    assert all(pair == {"A", "B"} for pair in pairs.values())
    assert export.adapter["lora_alpha"] > 0


def test_smallest_rank_of_vllm_is_enough() -> None:
    for rank in range(1, 513):
        allowed = smallest_max_lora_rank(rank)
        assert rank <= allowed
        assert all(smaller < rank for smaller in VLLM_RANKS if smaller < allowed)


@pytest.mark.parametrize("target", ["vllm", "llama_cpp", "ollama"])
def test_merged_model_goes_where_an_adapter_cannot(target: str, described: Callable[[str], Export]) -> None:
    for name in ("dora", "saved output", "biases", "tokens", "tied embedding", "ia3", "vera"):
        assert problems(target, replace(described(name), merged=True)) == [], name


def test_merged_model_is_refused_where_nothing_can_load_it(described: Callable[[str], Export]) -> None:
    plain = replace(described("rank 4"), merged=True)

    def refused(target: str, **changes: Any) -> str:
        found = problems(target, replace(plain, **changes))
        assert len(found) == 1, found
        return str(found[0])

    tied = described("tied embedding")
    assert "uses GemmaForCausalLM's embedding as the output layer" in refused(
        "llama_cpp", architecture="GemmaForCausalLM", adapter=tied.adapter, shapes=tied.shapes
    )
    assert "tokenizer.model, which the base doesn't have" in refused(
        "ollama", architecture="Gemma2ForCausalLM", has_sentencepiece=False
    )
    assert "without the new ones" in refused("llama_cpp", architecture="GemmaForCausalLM", new_tokens=True)
    assert "doesn't know OPTForCausalLM" in refused("llama_cpp", architecture="OPTForCausalLM")
    assert "needs 'n_ctx' in GPT2LMHeadModel's config.json" in refused("llama_cpp", architecture="GPT2LMHeadModel")
    assert "pre-tokenizer was not recognized" in refused("ollama", llama_cpp_tokenizer=False)
    rnn = refused("vllm", architecture="RwkvForCausalLM", transformers_backend=False)
    assert "has no RwkvForCausalLM" in rnn
    assert "use target=hf merge=true" in rnn
    assert "no update that can be merged" in str(problems("hf", replace(described("prompt"), merged=True))[0])
    assert problems("vllm", replace(described("classifier"), merged=True)) == []
    assert problems("vllm", replace(plain, architecture="OPTForCausalLM")) == []


def test_limits_beside_the_kind_of_adapter(described: Callable[[str], Export]) -> None:
    plain = described("rank 4")

    def reasons(target: str, **changes: Any) -> str:
        return "\n".join(problem.what for problem in problems(target, replace(plain, **changes)))

    assert "an adapter can't add tokens to its base" in reasons("vllm", new_tokens=True)
    assert "largest vocabulary is 258,048" in reasons("vllm", base={"vocab_size": 262_144})
    assert "init_lora_weights=pissa" in reasons("llama_cpp", adapter={**plain.adapter, "init_lora_weights": "pissa"})
    assert "LoRA on parameters" in reasons("vllm", adapter={**plain.adapter, "target_parameters": ["experts.w"]})
    odd = {**plain.shapes, "base_model.model.model.norm.weight": (64,)}
    assert "no tensors but lora_A and lora_B, and this one also has base_model.model.model.norm.weight" in reasons(
        "llama_cpp", shapes=odd
    )
    assert "BartForCausalLM, and transformers' code for it" in reasons(
        "vllm", architecture="BartForCausalLM", transformers_backend=False
    )
    experts = {
        name.replace("self_attn.q_proj", "mlp.experts.base_layer"): shape for name, shape in plain.shapes.items()
    }
    assert "LoRA on the experts of a mixture" in reasons("vllm", shapes=experts)
    assert reasons("vllm", architecture="") == "", "a model with code of its own is vLLM's to judge"


def test_architectures_are_names_of_transformers() -> None:
    import transformers

    lists = (known.LLAMA_CPP, known.VLLM_WITH_LORA, known.VLLM_WITHOUT_LORA, known.LLAMA_CPP_ADAPTERS)
    for name in frozenset().union(*lists, known.LLAMA_CPP_ALWAYS_TIED, known.LLAMA_CPP_SENTENCEPIECE):
        assert hasattr(transformers, name), name
    assert not known.VLLM_WITH_LORA & known.VLLM_WITHOUT_LORA
    assert known.LLAMA_CPP_ADAPTERS | known.LLAMA_CPP_ALWAYS_TIED | known.LLAMA_CPP_SENTENCEPIECE <= known.LLAMA_CPP
