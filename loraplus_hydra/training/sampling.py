"""Answers of a model to a few prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplus_hydra.io import interrupts
from loraplus_hydra.models.properties import table_size
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.tokens import encode_prompt


def answers(
    model: PreTrainedModel | Any, tokenizer: PreTrainedTokenizerBase, examples: Examples, max_new_tokens: int
) -> list[str]:
    """Return the model's greedy answer to each of the examples' prompts, without special tokens."""
    was_training = model.training
    model.eval()
    # A template adds its own special tokens. For a plain prompt the tokenizer adds them.
    special = not tokenizer.chat_template if examples.special_tokens is None else examples.special_tokens
    texts = [
        answer(model, tokenizer, prompt, max_new_tokens, special_tokens=special) or "" for prompt in examples.rendered
    ]
    model.train(was_training)
    return [" ".join(text.split()) for text in texts]


def sampling_arguments(temperature: float, top_p: float) -> dict[str, Any]:
    """Return the arguments of `generate` for a temperature; 0 is greedy."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}


def answer(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    special_tokens: bool,
    **generation: Any,
) -> str | None:
    """Return the model's greedy answer to one prompt, or None if the prompt has no tokens.

    With `special_tokens`, the tokenizer adds its special tokens to the prompt. If prompt and answer have more tokens
    than the model has positions, the prompt's beginning is cut. `generation` are arguments of `generate`.
    """
    interrupts.stop_if_asked()
    ids = encode_prompt(prompt, tokenizer, special_tokens=special_tokens)
    if not ids:
        return None
    limit = table_size(model)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - 1)
        ids = ids[-(limit - max_new_tokens) :]
    inputs = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False, **generation},
        )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
