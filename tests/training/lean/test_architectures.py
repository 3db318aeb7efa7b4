"""Models that people train, each tiny and random: as under the plain forward, and the reason where it runs instead."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from loraplus_hydra.training.lean.adopt import adopt
from tests.support.lean import GPT2, SIZES, VOCABULARY, Batch, gradients

LEAN, WINDOW = "lean, without padding", "plain for some batches, because a row is longer"
INTERFACE, SCALED = "doesn't use transformers' attention interface", "logits are scaled or capped"
DIFFERS = "the outputs differ by"

MARKED = {**SIZES, "bos_token_id": 1, "eos_token_id": 1}
GROUPED = {**MARKED, "num_key_value_heads": 2, "head_dim": 4}
WINDOWED = {**GROUPED, "sliding_window": 8}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
OPT = {
    **{key: value for key, value in MARKED.items() if key != "intermediate_size"},
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
}
slow = pytest.mark.slow

# Model type, settings, and what is reported, in order.
CAUSAL: list[Any] = [
    ("gpt2", GPT2, [LEAN]),
    ("opt", OPT, [LEAN, DIFFERS]),  # it counts positions from the first token, where padding is ahead of it
    ("gemma3_text", WINDOWED, [LEAN, WINDOW]),
    ("qwen2_moe", {**WINDOWED, **EXPERTS, "use_sliding_window": True, "max_window_layers": 0}, [LEAN, WINDOW]),
    ("qwen2_moe", {**WINDOWED, **EXPERTS}, [LEAN]),  # its mask has a window of 0, which no layer uses
    ("lfm2", {**GROUPED, "block_ff_dim": 24, "layer_types": ["conv", "full_attention"]}, [DIFFERS]),
    ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 4}, [INTERFACE]),
    ("granite", {**GROUPED, "logits_scaling": 4.0}, [SCALED]),
    *(
        pytest.param(*each, marks=slow)
        for each in (
            ("qwen3", GROUPED, [LEAN]),
            ("mistral", {**GROUPED, "sliding_window": None, "tie_word_embeddings": True}, [LEAN]),
            ("phi", MARKED, [LEAN]),
            ("phi3", WINDOWED, [LEAN, WINDOW]),
            ("gpt_neox", MARKED, [LEAN]),
            ("smollm3", GROUPED, [LEAN]),
            ("olmo2", GROUPED, [LEAN]),
            ("exaone4", WINDOWED, [LEAN, WINDOW]),
            ("mixtral", {**GROUPED, **EXPERTS}, [LEAN]),
            ("qwen3_moe", {**GROUPED, **EXPERTS}, [LEAN]),
            ("phimoe", {**WINDOWED, **EXPERTS}, [LEAN, WINDOW]),
            ("gemma2", {**WINDOWED, "final_logit_softcapping": None}, ["the argument softcap"]),
            ("gemma3_text", {**GROUPED, "final_logit_softcapping": 30.0}, [SCALED]),
            ("gpt_oss", {**WINDOWED, **EXPERTS}, ["the argument s_aux"]),
            ("cohere", GROUPED, [SCALED]),
            ("minimax", {**GROUPED, **EXPERTS}, [DIFFERS]),
            ("doge", {**GROUPED, "keep_window_size": 4}, ["gets other tokens"]),
            ("gpt_neo", {**OPT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, [INTERFACE]),
        )
    ),
]
CLASSIFIERS: list[Any] = [
    ("roberta", {**MARKED, "pad_token_id": 1}, [LEAN, DIFFERS]),  # with padding ahead it reads a padded place
    ("deberta-v2", MARKED, [INTERFACE]),
    *(
        pytest.param(*each, marks=slow)
        for each in (
            ("bert", MARKED, [LEAN, DIFFERS]),
            ("electra", {**MARKED, "embedding_size": 16}, [LEAN, DIFFERS]),
            ("modernbert", {**MARKED, "local_attention": 16, "global_attn_every_n_layers": 2}, [LEAN, WINDOW, DIFFERS]),
            ("albert", {**MARKED, "embedding_size": 8}, ["its pooler doesn't choose"]),
            ("llama", GROUPED, [LEAN]),
            ("qwen3", GROUPED, [LEAN]),
            ("gemma3_text", WINDOWED, [LEAN, WINDOW]),
            ("xlnet", {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}, [INTERFACE]),
            ("mpnet", MARKED, [INTERFACE]),
        )
    ),
]


def adapted(architecture: str, settings: dict[str, Any], classes: int) -> Any:
    """A PeftModel of random weights that are large enough to tell models apart, in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **settings, **({"num_labels": classes} if classes else {}))
    auto: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    base = auto.from_config(config).float()
    head = base.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in base.base_model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    task = "SEQ_CLS" if classes else "CAUSAL_LM"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=sorted(names) or ["c_attn"], task_type=task))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batches(pad: int) -> list[dict[str, torch.Tensor]]:
    """One row alone, equal rows, uneven ones, one beyond windows, and padding ahead of the tokens."""
    return [
        Batch((7,), supervised=1.0, pad=pad).tensors(),
        Batch((8, 8), pad=pad).tensors(),
        Batch((5, 3, 7, 2), pad=pad).tensors(),
        Batch((4, 30, 12), pad=pad).tensors(),
        Batch((3, 6), supervised=1.0, pad=pad, left=True).tensors(),
    ]


def check(
    architecture: str, settings: dict[str, Any], classes: int, expected: list[str], folder: Path, reports: list[str]
) -> None:
    model = adapted(architecture, settings, classes)
    reference = copy.deepcopy(model)
    adopt(Trainer(model=model, args=TrainingArguments(str(folder), use_cpu=True, report_to="none")), "auto")

    for batch in batches(settings.get("pad_token_id", 0)):
        if classes:
            batch["labels"] = torch.arange(len(batch["labels"])) % classes
        made, own = (each(**{name: value.clone() for name, value in batch.items()}) for each in (model, reference))

        torch.testing.assert_close(made.loss, own.loss, rtol=1e-5, atol=0)
        difference, size = (
            torch.cat([each.flatten() for each in parts]).norm()
            for parts in (
                [a - b for a, b in zip(gradients(made.loss, model), gradients(own.loss, reference), strict=True)],
                gradients(reference(**batch).loss, reference),
            )
        )
        assert difference <= 2e-5 * size

    assert len(reports) == len(expected), reports
    for report, part in zip(reports, expected, strict=True):
        assert part in report


@pytest.mark.parametrize(("architecture", "settings", "expected"), CAUSAL)
def test_a_causal_model_trains_as_under_the_plain_forward(
    architecture: str, settings: dict[str, Any], expected: list[str], tmp_path: Path, reports: list[str]
) -> None:
    check(architecture, settings, 0, expected, tmp_path, reports)


@pytest.mark.parametrize(("architecture", "settings", "expected"), CLASSIFIERS)
def test_a_classifier_trains_as_under_the_plain_forward(
    architecture: str, settings: dict[str, Any], expected: list[str], tmp_path: Path, reports: list[str]
) -> None:
    check(architecture, settings, 3, expected, tmp_path, reports)
