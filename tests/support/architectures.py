"""Tiny checkpoints of the architectures that people train, each built from its config with one small tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = 300
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,  # a multiple of bitsandbytes' block, so that 4-bit weights are whole blocks
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": {**_SIZES, "type_vocab_size": 1},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "llama": _GROUPED,
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "mistral": {**_GROUPED, "sliding_window": 64},
    "gemma": {**_GROUPED, "head_dim": 16},
}
CAUSAL = ("gpt2", "llama", "qwen2", "mistral", "gemma")
TOKENS = torch.arange(3, 51).reshape(4, 12)


def config_of(architecture: str, **changes: Any) -> PretrainedConfig:
    """The tiny config of an architecture, named as transformers' `model_type`."""
    return AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})


def checkpoint(architecture: str, folder: Path, pad_token: str | None = "<pad>", **changes: Any) -> Path:
    """Write a tiny checkpoint with its tokenizer into `folder`: a causal model, or else a classifier."""
    auto_class = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSequenceClassification
    torch.manual_seed(0)
    auto_class.from_config(config_of(architecture, **changes)).save_pretrained(folder)
    tokenizer(pad_token).save_pretrained(folder)
    return folder


def base_of(folder: Path, architecture: str = "llama") -> Any:
    """The model of a checkpoint, as transformers alone loads it."""
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSequenceClassification
    return auto.from_pretrained(folder)


def tokenizer(pad_token: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens: 0 is `<pad>`, 1 is `<eos>`; transformers insists on Qwen's `<|endoftext|>`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), pad_token=pad_token, eos_token="<eos>", model_max_length=128
    )


@cache
def _trained() -> str:
    backend = ByteLevelBPETokenizer()
    words = "say one two three four five six seven eight nine ten and then the number that comes after it again"
    backend.train_from_iterator(
        [words], vocab_size=VOCABULARY, min_frequency=1, special_tokens=["<pad>", "<eos>", "<unk>", "<|endoftext|>"]
    )
    assert backend.get_vocab_size() == VOCABULARY
    return str(backend.to_str())


def one_of_each_architecture(names: Iterable[str]) -> list[Any]:
    """Named models as parameters of a test; of those with one architecture, all but the first are slow."""
    import pytest
    from omegaconf import OmegaConf

    from loraplus_hydra.config.locations import config_folder

    found, seen = [], set()
    for name in names:
        architecture = OmegaConf.load(config_folder() / "model" / f"{name}.yaml").config.model_type
        found.append(pytest.param(name, marks=[pytest.mark.slow] if architecture in seen else []))
        seen.add(architecture)
    return found
