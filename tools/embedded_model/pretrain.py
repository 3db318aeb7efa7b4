"""Makes the embedded model: `python -m tools.embedded_model.pretrain --out FOLDER`.

A byte-level BPE tokenizer and a small Llama, both learnt from the standard library's source with its docstrings cut out
and without the modules that the embedded data set holds out. The shipped weights came from this script; see their card.
"""

from __future__ import annotations

import argparse
import ast
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraplus_hydra.data.embedded import definitions, source_of
from loraplus_hydra.data.embedded.source import Source, is_held_out, read_library, stable_hash
from loraplus_hydra.errors import UserError
from tools.embedded_model.card import Facts, model_card

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048  # tokens, the four special ones with them
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"  # ids 0 to 3
CONTEXT = 512  # tokens in a training sequence, and the longest the model has seen
BATCH = 4  # sequences a step
LEARNING_RATE = 4e-3  # of 2e-3 to 1e-2 the best over 600 steps
WARMUP_STEPS = 60
REPORT_STEPS = 250

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


def encode(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> list[list[int]]:
    """The training texts as token ids, each closed by END: modules first, then conversations in the chat template."""
    texts = [text + END for text in corpus.modules.values()]
    texts += [USER + begun + END + ASSISTANT + rest + END for turns in corpus.turns.values() for begun, rest in turns]
    return _ids(tokenizer, texts)


def _ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts))]


def new_model() -> LlamaForCausalLM:
    """The untrained model: 4 layers, hidden size 128, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.05,  # the usual 0.02 suits wider models; 0.1 nats better after 600 steps
            bos_token_id=None,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def batches(texts: list[list[int]], seed: int) -> Iterator[Tensor]:
    """Token ids (BATCH, CONTEXT) without end: texts in random order end to end, cut into sequences, those shuffled."""
    import torch

    order = random.Random(seed)
    texts = list(texts)
    while True:
        order.shuffle(texts)
        sequences = _sequences(texts)
        # A long module fills many sequences in a row: shuffled, a batch holds different ones (0.25 nats better).
        rows = order.sample(range(len(sequences)), len(sequences) // BATCH * BATCH)
        yield from sequences[torch.tensor(rows)].view(-1, BATCH, CONTEXT)


def _sequences(texts: list[list[int]]) -> Tensor:
    import torch

    stream = torch.tensor([token for text in texts for token in text])
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def train(model: LlamaForCausalLM, texts: list[list[int]], *, steps: int, seed: int) -> float:
    """Train in place with AdamW, a short warm-up, then linearly to 0; returns the mean loss of the last steps."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS), 1.0)
    )
    losses: list[float] = []
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
            recent = losses[-REPORT_STEPS:]
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {sum(recent) / len(recent):.3f}  {seconds:.0f} s", flush=True)
    recent = losses[-REPORT_STEPS:]
    return sum(recent) / len(recent)


def mean_loss(model: LlamaForCausalLM, texts: list[list[int]]) -> float:
    """Mean loss in nats a token over the texts end to end."""
    import torch

    model.eval()
    with torch.no_grad():
        parts = [(model(input_ids=rows, labels=rows).loss.item(), len(rows)) for rows in _sequences(texts).split(8)]
    return sum(loss * rows for loss, rows in parts) / sum(rows for _, rows in parts)


def pretrain(out: Path, *, steps: int, seed: int, threads: int) -> None:
    """Make everything that lies in the checkpoint's folder: weights, configs, tokenizer, card."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)

    corpus = read_corpus()
    turns = sum(map(len, corpus.turns.values()))
    print(f"read {len(corpus.modules)} modules, {turns} functions; {len(corpus.held_out)} modules held out", flush=True)
    tokenizer = train_tokenizer(list(corpus.modules.values()))
    texts = encode(tokenizer, corpus)
    held_out = _ids(tokenizer, [text + END for text in corpus.held_out.values()])
    model = new_model()
    print(f"{sum(map(len, texts))} tokens a pass, {model.num_parameters()} weights", flush=True)

    started = time.monotonic()
    train_loss = train(model, texts, steps=steps, seed=seed)
    seconds = time.monotonic() - started
    model = model.half()
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone, which an installed package can't use
    tokenizer.save_pretrained(out, save_jinja_files=False)  # one file less: the template goes into the config

    held_out_loss = mean_loss(model.float(), held_out)  # of the weights as they are stored
    print(f"loss {train_loss:.3f}, on held-out modules {held_out_loss:.3f}", flush=True)
    facts = Facts(
        steps=steps,
        seed=seed,
        threads=threads,
        seconds=seconds,
        python=platform.python_version(),
        copyright=sys.copyright,
        torch=torch.__version__,
        transformers=transformers.__version__,
        modules=len(corpus.modules),
        characters=sum(map(len, corpus.modules.values())),
        held_out=len(corpus.held_out),
        turns=turns,
        tokens=sum(map(len, texts)),
        parameters=model.num_parameters(),
        train_loss=train_loss,
        held_out_loss=held_out_loss,
        characters_a_token=sum(map(len, corpus.held_out.values())) / sum(map(len, held_out)),
    )
    (out / "README.md").write_text(model_card(facts), encoding="utf-8")
    print(f"wrote {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.embedded_model.pretrain",
        description="Pretrain the embedded model on the standard library's source, without docstrings.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; files of the same names are replaced")
    parser.add_argument("--steps", type=_at_least_one, default=4500, help="of 2,048 tokens each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (%(default)s)")
    parser.add_argument("--threads", type=_at_least_one, default=2, help="they change the rounding (%(default)s)")
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
