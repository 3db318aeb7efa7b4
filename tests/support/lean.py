"""Small models in float64 and batches of uneven rows, for tests of the lean forward; and its numbers made by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

IGNORED = -100
VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 600,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 600, "pad_token_id": 0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2},
    "qwen2": {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "phi": {**SIZES, "resid_pdrop": 0.0},
    "opt": {
        **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
        "dropout": 0.0,
    },
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, **_NO_DROPOUT},
    "roberta": {**SIZES, **_NO_DROPOUT, "pad_token_id": 1},
    "electra": {**SIZES, **_NO_DROPOUT, "embedding_size": 16},
    "llama": {**SIZES, "num_key_value_heads": 2},
    "gpt2": CAUSAL["gpt2"],
}


def adapted(architecture: str, *, classes: int = 0, dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """A PeftModel of the architecture whose LoRA factors are all random; with `classes` it is a classifier."""
    torch.manual_seed(0)
    settings = (CLASSIFIERS if classes else CAUSAL)[architecture]
    labels = {"num_labels": classes} if classes else {}
    config = AutoConfig.for_model(architecture, **settings, **labels)
    auto: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    base = auto.from_config(config).requires_grad_(False)
    arguments = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS" if classes else "CAUSAL_LM", **lora}
    model = get_peft_model(base, LoraConfig(**arguments)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@dataclass(frozen=True)
class Batch:
    """Rows of the lengths given, padded at the end, with labels at random places."""

    lengths: tuple[int, ...]
    supervised: float = 0.5  # share of the tokens that carry loss
    seed: int = 0
    pad: int = 0
    left: bool = False  # padding ahead of the tokens

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        rows, columns = len(self.lengths), max(self.lengths)
        mask = torch.arange(columns)[None] < torch.tensor(self.lengths)[:, None]
        mask = mask.flip(1) if self.left else mask
        ids = torch.randint(2, VOCABULARY, (rows, columns), generator=generator).masked_fill(~mask, self.pad)
        loss = torch.rand(rows, columns, generator=generator) < self.supervised
        first = mask.long().cumsum(1) == 1  # of each row: no token comes before it
        labels = ids.masked_fill(~(mask & loss) | first, IGNORED)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


LENGTHS = st.lists(st.sampled_from((2, 2, 3, 5, 8, 13, 21)), min_size=1, max_size=5).map(tuple)
BATCHES = st.builds(Batch, lengths=LENGTHS, supervised=st.sampled_from((0.0, 0.2, 0.6, 1.0)), seed=st.integers(0, 99))


def by_hand(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Log-probability, entropy and hit of each label, in the batch's order, from one unpadded row at a time.

    `model` is the transformers model with its layers adapted, run by its own forward.
    """
    scores: list[list[torch.Tensor]] = [[], [], []]
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        row, targets = ids[mask.bool()][None], labels[mask.bool()]
        hidden = model.base_model(input_ids=row).last_hidden_state[0, :-1]
        chosen = targets[1:] != IGNORED
        logits = model.get_output_embeddings()(hidden[chosen])
        log_shares = logits - logits.logsumexp(1, keepdim=True)
        scores[0].append(log_shares.gather(1, targets[1:][chosen][:, None])[:, 0])
        scores[1].append(-(log_shares.exp() * log_shares).sum(1))
        scores[2].append((logits.argmax(1) == targets[1:][chosen]).to(logits.dtype))
    return [torch.cat(each) for each in scores]


def gradients(value: torch.Tensor, model: Any) -> list[torch.Tensor]:
    """The gradients of a value by the model's trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True))


def assert_close(made: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    """Fail unless every number agrees, relative to the largest of its tensor."""
    for one, other in zip(made, expected, strict=True):
        assert one.shape == other.shape
        if other.numel():
            scale = max(float(other.detach().abs().max()), 1e-3)
            assert float((one - other).detach().abs().max()) <= tolerance * scale


def assert_equal_within(one: Any, other: Any, tolerance: float) -> None:
    """Fail unless two lines of metrics have the same keys and their numbers agree relatively."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_within(one[key], other[key], tolerance)
    else:
        assert one == pytest.approx(other, rel=tolerance, abs=1e-12), (one, other)
