"""Answers of a model to a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answers(
    model: PreTrainedModel | Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """The model's greedy answer to each prompt (as rendered for the model), its special tokens left out."""
    import torch

    was_training = model.training
    model.eval()
    found = []
    for prompt in prompts:
        # A template writes its own special tokens; a plain prompt gets the tokenizer's.
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "token_type_ids"}
        with torch.no_grad():
            output = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(" ".join(answer.split()))
    model.train(was_training)
    return found
