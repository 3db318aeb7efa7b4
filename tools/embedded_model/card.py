"""The model card beside the embedded model's weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Arguments, measurements and versions of one run of the pretraining script."""

    steps: int
    seed: int
    threads: int
    seconds: float
    python: str  # version of the CPython whose library was read
    copyright: str  # of that Python
    torch: str
    transformers: str
    modules: int
    characters: int
    held_out: int
    turns: int
    tokens: int  # of one pass over everything
    parameters: int
    train_loss: float  # nats a token, mean of the last steps
    held_out_loss: float  # nats a token, over the held-out modules
    characters_a_token: float  # in the held-out modules


def model_card(facts: Facts) -> str:
    """Return the card as Markdown, with front matter for the Hugging Face hub."""
    return _CARD.format(
        facts=facts,
        command=f"--out FOLDER --steps {facts.steps} --seed {facts.seed} --threads {facts.threads}",
        minutes=facts.seconds / 60,
        characters=facts.characters / 1e6,
        tokens=facts.tokens / 1e6,
        copyright="\n".join(f"    {line}".rstrip() for line in facts.copyright.splitlines()),
    )


_CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
pipeline_tag: text-generation
library_name: transformers
---

# The embedded model of loraplus_hydra

A very small Llama ({facts.parameters:,} weights, float16) with a byte-level BPE tokenizer and a chat template. It is
there so that `python -m loraplus_hydra` trains something real without a network: fine-tuned on `data=embedded`, it
learns to say in one sentence what a piece of Python does. It is of no use for anything else.

## How it was made

From a checkout of loraplus_hydra:

    python -m tools.embedded_model.pretrain {command}

- **Text**: the standard library's source of CPython {facts.python}: {facts.modules} modules, {characters:.1f} million
  characters, comments included, **every docstring cut out**. Left out: tests, character tables (`encodings`), the
  manual's text (`pydoc_data`), and the {facts.held_out} modules that the embedded data set holds out for evaluation;
  the tokenizer has not seen those either.
- **Conversations**: {facts.turns:,} functions of the same modules again, each cut in two at a line's end: a user's turn
  and the assistant's. They train the chat template's tokens; they hold no questions and answers.
- **Training**: {facts.steps:,} steps of AdamW, 2,048 tokens each, {tokens:.1f} million tokens a pass,
  {minutes:.0f} minutes on {facts.threads} CPU threads; torch {facts.torch}, transformers {facts.transformers}. Nothing
  was downloaded. The same machine, versions, seed and threads give the same weights; another machine rounds otherwise.
- **Loss**: {facts.train_loss:.2f} nats a token at the end of training, **{facts.held_out_loss:.2f}** on the held-out
  modules (code without docstrings, {facts.characters_a_token:.2f} characters a token).

## Use

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

Its special tokens are `<|user|>`, `<|assistant|>`, `<|end|>` (end of a turn, end of a text, eos) and `<|pad|>`.
A system turn reads like a user's. The template marks the assistant's turns with `generation`, so TRL's
`assistant_only_loss` works. It was trained on sequences of 512 tokens and has seen none longer.

## Limits

It writes code-like text and has no knowledge; don't take anything it says about Python as true. It knows next to no
English beyond the comments in the library. A later Python may have moved code from a module that was trained on into
one that is held out; between CPython 3.10 and 3.13 no held-out prompt of the data set is a training prompt of 3.11.

## Licence

The text is CPython's, under the [PSF licence](https://docs.python.org/3/license.html); parts of the library carry
licences of their own, listed there. None of it is shipped here: the tokenizer holds fragments of words, the weights
are numbers learnt from it. As far as they derive from it, they come under the same licence; the changes made are those
described above (docstrings and modules left out, the rest reduced to weights). The copyright of that Python:

{copyright}

The Python Software Foundation has no part in this model and doesn't endorse it. The script is under this project's
own licence.
"""
