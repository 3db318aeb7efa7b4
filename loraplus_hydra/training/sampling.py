"""Answers of a model to a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraplus_hydra.io import interrupts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answers(
    model: PreTrainedModel | Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Return the model's greedy answer to each rendered prompt, without special tokens."""
    was_training = model.training
    model.eval()
    # A template writes its own special tokens; a plain prompt gets the tokenizer's.
    plain = not tokenizer.chat_template
    texts = [answer(model, tokenizer, prompt, max_new_tokens, special_tokens=plain) for prompt in prompts]
    model.train(was_training)
    return [" ".join(text.split()) for text in texts]


def answer(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    special_tokens: bool,
) -> str:
    """Return the model's greedy answer to one prompt.

    With `special_tokens` the tokenizer adds its own tokens to the prompt.
    """
    import torch

    interrupts.stop_if_asked()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=special_tokens)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "token_type_ids"}
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
