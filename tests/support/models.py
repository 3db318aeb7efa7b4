"""Tiny models for tests, built from configs and never downloaded; every one has the layers that its name promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def llama(hidden: int = 16, layers: int = 2, vocabulary: int = VOCABULARY, **changes: Any) -> LlamaForCausalLM:
    """A causal model with RMSNorm and linears without bias; its head isn't tied to its embedding."""
    torch.manual_seed(0)
    sizes = {**_SIZES, "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=2, **changes)
    return LlamaForCausalLM(config)


def bert() -> BertForSequenceClassification:
    """A classifier with LayerNorm, biases everywhere and a head called `classifier`."""
    torch.manual_seed(0)
    config = BertConfig(**_SIZES, num_hidden_layers=1, num_labels=2)
    return BertForSequenceClassification(config)


def gpt2() -> GPT2LMHeadModel:
    """A causal model on transformers' `Conv1D`, whose weights lie the other way round."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))


def mixtral() -> MixtralForCausalLM:
    """A mixture of two experts whose weights are fused into single 3-D parameters."""
    torch.manual_seed(0)
    config = MixtralConfig(**_SIZES, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=2)
    return MixtralForCausalLM(config)


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions, a batch norm and a linear head, over a batch of 4 x 6 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1d = nn.Conv1d(1, 4, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 4, 3, padding=1)
        self.conv3d = nn.Conv3d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = len(x)
        x = self.conv1d(x.reshape(batch, 1, 24))
        x = self.norm(self.conv2d(x.mean(1).reshape(batch, 1, 4, 6)))
        x = self.conv3d(x.mean(1).reshape(batch, 1, 2, 2, 6))
        return self.head(x.mean(1).reshape(batch, 24))


def with_lora(model: nn.Module, **config: Any) -> nn.Module:
    """`model` with a LoRA adapter of rank 4 on it, made after seeding, so that two calls give equal weights."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))


ADAPTED: dict[str, Callable[[], nn.Module]] = {
    "linears": lambda: with_lora(llama()),
    "conv1d_of_gpt2": lambda: with_lora(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "embedding": lambda: with_lora(llama(), target_modules=["q_proj", "embed_tokens"]),
    "convolutions": lambda: with_lora(ConvNet(), target_modules=["conv1d", "conv2d", "conv3d", "head"]),
    "dora": lambda: with_lora(llama(), use_dora=True),
    "dora_on_embedding": lambda: with_lora(llama(), use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "dora_on_convolutions": lambda: with_lora(ConvNet(), target_modules=["conv2d", "head"], use_dora=True),
    "saved_classifier": lambda: with_lora(bert(), target_modules=["query", "value"], task_type="SEQ_CLS"),
    "saved_embedding": lambda: with_lora(
        llama(), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "saved_layer_norm": lambda: with_lora(bert(), target_modules=["query"], modules_to_save=["LayerNorm"]),
    "all_biases": lambda: with_lora(bert(), target_modules=["query"], bias="all"),
    "lora_biases": lambda: with_lora(bert(), target_modules=["query"], bias="lora_only"),
    "bias_of_lora_b": lambda: with_lora(bert(), target_modules=["query"], lora_bias=True),
    "trainable_tokens": lambda: with_lora(
        llama(), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}
    ),
    "experts": lambda: with_lora(mixtral(), target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
    "full_weights": bert,
    "adalora": lambda: get_peft_model(llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=50)),
}
"""Every kind of adapter on which we do as PEFT does; none trains an RMSNorm, where we differ from it on purpose."""


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """A loss that depends on every trained weight, over a batch that depends on `step`."""
    generator = torch.Generator().manual_seed(step)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, ConvNet):
        return model(torch.randn(3, 4, 6, generator=generator)).pow(2).mean()
    tokens = torch.randint(0, base.config.vocab_size, (3, 8), generator=generator)
    labels = tokens if not isinstance(base, BertForSequenceClassification) else tokens[:, 0] % 2
    return model(input_ids=tokens, labels=labels).loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """Train `model` for some steps of `loss_of`, from step `first` on; the losses."""
    model.train()
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)  # dropout
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
