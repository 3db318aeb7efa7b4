"""Model FLOPs utilisation: torch's own count of a step's products, and the peaks of known GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from loraplus_hydra.training.utilisation import flops_of_token, peak_flops, tokens_at_peak

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
BASES = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, attn_implementation="eager")),
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, attn_implementation="eager")
    ),
}


# Nothing that is trained stands before the first layers, so torch needs no gradient of their inputs.
FIRST = {"Llama": 3 * (32 * 32 + 32 * 4), "GPT-2": 32 * 96 + 32 * 4}  # query, key and value, with their lora_A


@pytest.mark.parametrize("base", BASES)
def test_flops_of_a_token_are_what_torch_counts_without_attention_s_own_products(base: str) -> None:
    model: Any = get_peft_model(BASES[base](), LoraConfig(target_modules="all-linear", r=4))
    tokens = torch.randint(0, 64, (2, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    of_attention = sum(count for name, count in counts.items() if str(name) == "aten.bmm")
    of_layers = sum(counts.values()) - of_attention
    assert flops_of_token(model) == of_layers / tokens.numel() + 2 * FIRST[base]


def test_experts_have_no_known_flops() -> None:
    config = MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=2, num_key_value_heads=4)
    assert flops_of_token(MixtralForCausalLM(config)) is None


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA H100 NVL", torch.bfloat16, None),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", torch.bfloat16, None),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L40", torch.bfloat16, None),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("Radeon", torch.bfloat16, None),
    ],
)
def test_peak_is_known_for_known_gpus_in_16_bits(gpu: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_flops(gpu, dtype) == peak


def test_share_of_the_peak_comes_from_tokens_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-40GB")
    model = torch.nn.Linear(1000, 10, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    assert tokens_at_peak(model, torch.device("cuda"), None) == 312e12 / 40_000
    assert tokens_at_peak(model, torch.device("cpu"), None) is None
    assert tokens_at_peak(model.float(), torch.device("cuda"), None) is None
    assert tokens_at_peak(model, torch.device("cuda"), torch.float16) == 312e12 / 40_000
