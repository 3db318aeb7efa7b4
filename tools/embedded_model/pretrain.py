"""Pretraining of the embedded model: `python -m tools.embedded_model.pretrain --out FOLDER`.

Trains a byte-level BPE tokenizer and a small Llama on the source of the standard library. Docstrings are cut out, and
the modules that the embedded data set holds out for evaluation are left out. The card beside the shipped weights has
the arguments that made them.
"""

from __future__ import annotations

import argparse
import ast
import platform
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplus_hydra.data.embedded import definitions, source_of
from loraplus_hydra.data.embedded.source import Source, is_held_out, no_collections, read_library, stable_hash
from loraplus_hydra.errors import UserError
from tools.embedded_model.card import Facts, model_card
from tools.embedded_model.turns import ASSISTANT, CHAT_TEMPLATE, END, PAD, USER

VOCABULARY = 2048  # tokens, including the four special ones
CONTEXT = 512  # tokens in a training sequence, and the longest the model has seen
BATCH = 4  # sequences a step
LEARNING_RATE = 4e-3  # the best of 2e-3 to 1e-2 after 600 steps
WARMUP_STEPS = 60
REPORT_STEPS = 250


@dataclass(frozen=True)
class Corpus:
    """Texts without docstrings, by module: whole modules, and definitions as turns of a conversation."""

    modules: dict[str, str]
    turns: dict[str, list[tuple[str, str]]]
    held_out: dict[str, str]


@no_collections()
def read_corpus() -> Corpus:
    """Read the texts to train on (`modules`, `turns`) and the whole modules to evaluate on (`held_out`)."""
    corpus = Corpus({}, {}, {})
    for name, source in read_library():
        if is_held_out(name):
            corpus.held_out[name] = source.without_docstrings()
        else:
            corpus.modules[name] = source.without_docstrings()
            corpus.turns[name] = list(_turns(source))
    return corpus


def _turns(source: Source) -> Iterator[tuple[str, str]]:
    """Yield each function in two parts, cut at a line's end: the user's turn and the assistant's."""
    # The library's source has no token of the chat template: without these turns the model would not know them.
    for node, owner in definitions(source.tree):
        if isinstance(node, ast.ClassDef):
            continue
        lines = source_of(source, node, owner).split("\n")
        cut = 2 + stable_hash("\n".join(lines)) % max(1, len(lines) - 3)
        if len(lines) >= 4:
            yield "\n".join(lines[:cut]), "\n".join(lines[cut:])


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which restores every text from its tokens."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=sorted(byte_level.alphabet()),
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


def encode(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> list[list[int]]:
    """Return the training texts as token ids, each ending with END.

    Modules come first, then conversations in the chat template.
    """
    texts = [text + END for text in corpus.modules.values()]
    texts += [USER + user + END + ASSISTANT + reply + END for turns in corpus.turns.values() for user, reply in turns]
    return _ids(tokenizer, texts)


def _ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts))]


def new_model() -> LlamaForCausalLM:
    """Return the untrained model: 4 layers, hidden size 128, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.05,  # 0.1 nats better after 600 steps than the usual 0.02, which suits wider models
            bos_token_id=None,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def batches(texts: list[list[int]], seed: int) -> Iterator[Tensor]:
    """Yield token ids of shape (BATCH, CONTEXT) without end.

    Each pass joins the texts in random order, cuts them into sequences and shuffles those.
    """
    order = random.Random(seed)
    texts = list(texts)
    while True:
        order.shuffle(texts)
        sequences = _sequences(texts)
        # A long module fills many sequences in a row; shuffled, a batch has several modules (0.25 nats better).
        rows = order.sample(range(len(sequences)), len(sequences) // BATCH * BATCH)
        yield from sequences[torch.tensor(rows)].view(-1, BATCH, CONTEXT)


def _sequences(texts: list[list[int]]) -> Tensor:
    stream = torch.tensor([token for text in texts for token in text])
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def train(model: LlamaForCausalLM, texts: list[list[int]], *, steps: int, seed: int) -> float:
    """Train `model` in place and return the mean loss of the last steps, in nats a token."""
    optimizer, schedule = _optimizer(model, steps)
    losses: deque[float] = deque(maxlen=REPORT_STEPS)
    started = time.monotonic()
    model.train()
    for step, tokens in zip(range(1, steps + 1), batches(texts, seed), strict=False):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % REPORT_STEPS == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {sum(losses) / len(losses):.3f}  {seconds:.0f} s", flush=True)
    return sum(losses) / len(losses)


def _optimizer(model: LlamaForCausalLM, steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """Return AdamW and its schedule: a short warm-up, then linear decay to 0."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS), 1.0)
    )


def mean_loss(model: LlamaForCausalLM, texts: list[list[int]]) -> float:
    """Return the mean loss over the texts, in nats a token."""
    model.eval()
    with torch.no_grad():
        parts = [(model(input_ids=rows, labels=rows).loss.item(), len(rows)) for rows in _sequences(texts).split(8)]
    return sum(loss * rows for loss, rows in parts) / sum(rows for _, rows in parts)


def pretrain(out: Path, *, steps: int, seed: int, threads: int) -> None:
    """Train tokenizer and model, and write them and their card into the folder `out`."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)

    corpus = read_corpus()
    print(f"read {len(corpus.modules)} modules; {len(corpus.held_out)} modules held out", flush=True)
    tokenizer = train_tokenizer(list(corpus.modules.values()))
    texts = encode(tokenizer, corpus)
    model = new_model()
    print(f"{sum(map(len, texts))} tokens a pass, {model.num_parameters()} weights", flush=True)

    started = time.monotonic()
    train_loss = train(model, texts, steps=steps, seed=seed)
    seconds = time.monotonic() - started
    model = model.half()
    save(out, model, tokenizer)

    held_out = _ids(tokenizer, [text + END for text in corpus.held_out.values()])
    held_out_loss = mean_loss(model.float(), held_out)  # float() of the stored float16 weights
    print(f"loss {train_loss:.3f}, on held-out modules {held_out_loss:.3f}", flush=True)
    facts = Facts(
        steps=steps,
        seed=seed,
        threads=threads,
        seconds=seconds,
        parameters=model.num_parameters(),
        train_loss=train_loss,
        held_out_loss=held_out_loss,
        **_corpus_facts(corpus, texts, held_out),
        **_software_facts(),
    )
    (out / "README.md").write_text(model_card(facts), encoding="utf-8")
    print(f"wrote {out}")


def _corpus_facts(corpus: Corpus, texts: list[list[int]], held_out: list[list[int]]) -> dict[str, Any]:
    return {
        "modules": len(corpus.modules),
        "characters": sum(map(len, corpus.modules.values())),
        "turns": sum(map(len, corpus.turns.values())),
        "tokens": sum(map(len, texts)),
        "held_out": len(corpus.held_out),
        "characters_a_token": sum(map(len, corpus.held_out.values())) / sum(map(len, held_out)),
    }


def _software_facts() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "copyright": sys.copyright,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the checkpoint: weights, configs and tokenizer."""
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone; an installed package needs it readable
    tokenizer.save_pretrained(out, save_jinja_files=False)  # puts the template into the config: one file less


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and pretrain."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.embedded_model.pretrain",
        description="Pretrain the embedded model on the source of the standard library, without docstrings.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; files of the same names are replaced")
    parser.add_argument("--steps", type=_at_least_one, default=4500, help="steps of 2,048 tokens each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (%(default)s)")
    parser.add_argument(
        "--threads", type=_at_least_one, default=2, help="CPU threads; they change rounding (%(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        pretrain(given.out, steps=given.steps, seed=given.seed, threads=given.threads)
    except UserError as error:
        sys.exit(str(error))


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    main()
