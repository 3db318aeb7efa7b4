"""Makes the embedded model: `python -m loraplus_hydra.embedded.pretrain --out FOLDER`.

A byte-level BPE tokenizer and a small Llama, both learnt from the standard library's source with its docstrings cut out
and without the modules that the embedded data set holds out. The shipped weights came from this script; see their card.
"""

from __future__ import annotations

import argparse
import ast
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraplus_hydra.data.embedded import definitions, source_of
from loraplus_hydra.embedded.card import Facts, model_card
from loraplus_hydra.embedded.source import Source, is_held_out, read_library, stable_hash

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048  # tokens, the four special ones with them
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CONTEXT = 512  # tokens in a training sequence, and the longest the model has seen
BATCH = 8  # sequences a step
LEARNING_RATE = 4e-3
WARMUP_STEPS = 100

# `generation` marks what the assistant says: TRL's assistant_only_loss learns from that alone.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- '<|user|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Corpus:
    """Texts without docstrings, by module: whole modules, and definitions as turns of a conversation."""

    modules: dict[str, str]
    turns: dict[str, list[tuple[str, str]]]
    held_out: dict[str, str]


def read_corpus() -> Corpus:
    """What the model learns from (`modules` and `turns`), and whole modules to measure it on (`held_out`)."""
    corpus = Corpus({}, {}, {})
    for name, source in read_library():
        if is_held_out(name):
            corpus.held_out[name] = source.without_docstrings()
        else:
            corpus.modules[name] = source.without_docstrings()
            corpus.turns[name] = list(_turns(source))
    return corpus


def _turns(source: Source) -> Iterator[tuple[str, str]]:
    """Functions, each cut in two at a line's end: the user begins it, the assistant goes on.

    So the model knows the chat template and its tokens, which the library's source has never seen.
    """
    for node, owner in definitions(source.tree):
        if isinstance(node, ast.ClassDef):
            continue
        lines = source_of(source, node, owner).split("\n")
        begun = 2 + stable_hash("\n".join(lines)) % max(1, len(lines) - 3)
        if len(lines) >= 4:
            yield "\n".join(lines[:begun]), "\n".join(lines[begun:])


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text comes back from its tokens unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
