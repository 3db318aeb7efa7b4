"""Tokens of base models: a tokenizer that fits, a pad token, and the rows of new tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.base_model import load_base
from loraplus_hydra.models.tokenizer import load_tokenizer, new_token_ids
from tests.conftest import Finished
from tests.models.test_model import model_group
from tests.support.architectures import checkpoint, config_of


def test_tokenizer_with_more_tokens_than_the_model_is_refused(
    tmp_path: Path, rows: Path, cli: Callable[..., Finished]
) -> None:
    checkpoint("llama", tmp_path, vocab_size=200)
    ended = cli("check", "model=hub", f"model.path={tmp_path}", "data=jsonl", f"data.train={rows}")
    assert ended.status == 1
    assert "model.tokenizer: the tokenizer has 300 tokens, but the model's embedding has 200 rows" in ended.err


@pytest.mark.parametrize(
    ("vocabulary", "pad"),
    [
        (["<eos>", "<pad>", "<unk>"], "<pad>"),
        (["<eos>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"], "<|reserved_special_token_0|>"),
        (["<eos>", "<unk>"], "<unk>"),
        (["<eos>"], "<eos>"),
    ],
)
def test_a_token_that_no_text_has_pads_where_the_tokenizer_has_none(
    vocabulary: list[str], pad: str, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path)
    config_of("llama").save_pretrained(tmp_path)
    assert load_tokenizer(model_group(tmp_path)).pad_token == pad
    assert load_tokenizer(model_group(tmp_path, pad_token="<eos>")).pad_token == "<eos>"
    with pytest.raises(ConfigErrors, match=r"model\.pad_token: '<nothing>' is not a token"):
        load_tokenizer(model_group(tmp_path, pad_token="<nothing>"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])  # untied, tied, tied and Conv1D
def test_only_the_rows_of_new_tokens_train(architecture: str, tmp_path: Path, compose: Callable[..., Any]) -> None:
    checkpoint(architecture, tmp_path)
    config = compose("model=hub", f"model.path={tmp_path}", "model.add_tokens=['<call>','<answer>']")
    grown = load_tokenizer(config.model)
    ids = new_token_ids(grown, config.model)
    assert ids == [300, 301]
    torch.manual_seed(0)
    base = load_base(config, grown)
    assert base.get_input_embeddings().weight.shape[0] == 302
    before = base.get_input_embeddings().weight.clone()
    model = add_adapter(base, config.adapter, "CAUSAL_LM", new_tokens=ids)
    rows = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {tuple(p.shape) for p in rows.values()} == {(2, 64)}
    assert len(rows) == (2 if architecture == "llama" else 1), "an output layer of its own has new rows too"

    tokens = torch.randint(2, 300, (4, 12))
    tokens[:, 3], tokens[:, 5] = 300, 301
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    merged = model.merge_and_unload().get_input_embeddings().weight
    torch.testing.assert_close(merged[:300], before[:300], rtol=0, atol=0)
    assert (merged[300:] != before[300:]).any(dim=1).all()


GIVEN_ROWS: list[Any] = [
    ("llama", [5, 6], {5, 6}, set()),
    ("qwen2", [5, 6], {5, 6}, {5, 6}),
    ("llama", {"embed_tokens": [5]}, {5}, set()),
    ("llama", {"model.embed_tokens": [5], "lm_head": [7]}, {5}, {7}),
    ("llama", {"lm_head": [7]}, set(), {7}),
    ("qwen2", {"embed_tokens": [5], "lm_head": [5]}, {5}, {5}),
]


@pytest.mark.parametrize(("architecture", "given", "inside", "outside"), GIVEN_ROWS)
def test_rows_that_are_listed_train_beside_those_of_new_tokens(
    architecture: str, given: Any, inside: set[int], outside: set[int], tmp_path: Path, compose: Callable[..., Any]
) -> None:
    checkpoint(architecture, tmp_path)
    config = compose("model=hub", f"model.path={tmp_path}", "model.add_tokens=['<call>','<answer>']")
    tokenizer = load_tokenizer(config.model)
    base = load_base(config, tokenizer)
    before = [each.weight.clone() for each in (base.get_input_embeddings(), base.get_output_embeddings())]
    adapter = {**config.adapter, "target_modules": ["q_proj"], "trainable_token_indices": given}
    model = add_adapter(base, adapter, "CAUSAL_LM", new_tokens=new_token_ids(tokenizer, config.model))

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            with torch.no_grad():
                parameter.add_(1.0)
    merged = model.merge_and_unload()

    after = (merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    for old, new, rows in zip(before, after, (inside, outside), strict=True):
        assert set((old != new).any(dim=1).nonzero().flatten().tolist()) == rows | {300, 301}


def test_new_tokens_that_exist_already_or_cannot_train_are_refused(
    tmp_path: Path, rows: Path, cli: Callable[..., Finished]
) -> None:
    checkpoint("llama", tmp_path)
    base = ["check", "model=hub", f"model.path={tmp_path}", "data=jsonl", f"data.train={rows}"]
    ended = cli(*base, "model.add_tokens=['<eos>','<new>']")
    assert "model.add_tokens: <eos> is a token already" in ended.err
    ended = cli(*base, "model.add_tokens=['<new>','<new>']")
    assert "model.add_tokens: <new> is listed twice" in ended.err
    ended = cli(*base, "model.add_tokens=['<new>']", "adapter=vera", "loraplus=roles")
    assert "model.add_tokens: VeraConfig can't train the rows of new tokens" in ended.err
    ended = cli(*base, "model.add_tokens=['<new>']", "adapter=lora_embeddings")
    assert "model.add_tokens: rows of new tokens can't train if the adapter adapts the embedding" in ended.err
