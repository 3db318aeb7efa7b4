"""Tiny models with tokenizers of their own, in folders as transformers loads them; made once a test session.

Its fixtures are known to every test module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tools.embedded_model.turns import ASSISTANT, END, PAD, USER
from tools.embedded_model.turns import CHAT_TEMPLATE as TEMPLATE

if TYPE_CHECKING:  # imported where needed: every test module has these fixtures, and most need no model
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# It does not mark the assistant's turns.
UNMARKED_TEMPLATE = TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "what is the number after one? the number after one is two.",
    "say 0 1 2 3 4 5 6 7 8 9; a card has not arrived and a payment failed",
]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE with turns as special tokens; `template=None` leaves it without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=128,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer of whole words: [CLS] text [SEP] pair [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for text in CORPUS for word in text.replace("?", " ?").replace(".", " .").split()})
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _sizes(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
    }


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a Llama of two layers and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        **_sizes(tokenizer),
        num_hidden_layers=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a BERT encoder of one layer without a classification head, and its tokenizer."""
    from transformers import BertConfig, BertModel, set_seed

    set_seed(0)
    config = BertConfig(**_sizes(tokenizer), num_hidden_layers=1, max_position_embeddings=32)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), chat_tokenizer())


@pytest.fixture(scope="session")
def plain_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return save_llama(tmp_path_factory.mktemp("plain_llama"), chat_tokenizer(None))


@pytest.fixture(scope="session")
def unmarked_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a template that doesn't mark the assistant's turns."""
    return save_llama(tmp_path_factory.mktemp("unmarked_llama"), chat_tokenizer(UNMARKED_TEMPLATE))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), word_tokenizer())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A JSONL file of the rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ids_of(tokenizer: PreTrainedTokenizerBase, *parts: str) -> list[int]:
    """The tokens of parts, each tokenised by itself; a special token is a part of its own."""
    return [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]


def masked(ids: Iterable[int]) -> list[int]:
    """Labels that carry no loss."""
    return [-100 for _ in ids]
