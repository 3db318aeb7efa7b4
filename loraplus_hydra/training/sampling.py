"""Answers of a model to prompts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from loraplus_hydra.io import interrupts
from loraplus_hydra.models.properties import table_size
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.tokens import encode_prompt

# In float32, padding and the batch's other rows change a logit by less than this.
_NEAR_TIE = 1e-3
# Settings of a model's generation_config that don't count tokens of the prompt, where padding would be counted too.
_PADDING_INDEPENDENT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation"),
    *("transformers_version", "_from_model_config"),
}

_OFF = (None, False, 0, 1)  # values with which such a setting does nothing: num_beams=1, repetition_penalty=1.0


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
    (tokens,) = _generate(model, tokenizer, [ids], max_new_tokens, **generation)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def answer_together(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    **generation: Any,
) -> list[str]:
    """Return the answers to several prompts, given as tokens, from one batch with padding on the left.

    If the model is in float32, greedy answers have the same tokens as those to each prompt alone: an answer with two
    tokens that are about equally likely is computed again alone. In a lower precision they can differ there.
    """
    alone = len(prompts) == 1 or bool(generation.get("do_sample")) or not is_float32(model)
    ties = _Ties()
    rows = _generate(model, tokenizer, prompts, max_new_tokens, logits_processor=[] if alone else [ties], **generation)
    if not alone:
        for number, row in enumerate(rows):
            if ties.has_tie(number, len(row)) and not interrupts.requested():
                (rows[number],) = _generate(model, tokenizer, [prompts[number]], max_new_tokens, **generation)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def is_float32(model: PreTrainedModel | Any) -> bool:
    """Return True if all weights are float32."""
    return all(parameter.dtype == torch.float32 for parameter in model.parameters())


def padding_problem(model: PeftModel) -> str:
    """Return the reason why padding on the left would change the model's answers; empty if it doesn't."""
    base: Any = model.get_base_model()
    settings = base.generation_config.to_diff_dict().items()
    counting = sorted(key for key, value in settings if key not in _PADDING_INDEPENDENT and value not in _OFF)
    if counting:
        return f"the model's generation_config sets {', '.join(counting)}, which can count padding"
    # `generate` counts positions without padding for models that take position_ids.
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "the model takes no position_ids"
    if base._is_stateful:
        return "the model's state would take padding in"
    rope: Any = getattr(base.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return "the longest text of a batch would change the positions of the others"
    if model.active_peft_config.is_prompt_learning:
        return "the adapter puts tokens before the text"
    return ""


class Stopped(StoppingCriteria):
    """Ends answers after a signal."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), bool(interrupts.requested()), device=input_ids.device)


class _Ties(LogitsProcessor):
    """Notes for each row and step whether the two best logits are about equal."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        best = scores.topk(2, dim=-1).values
        self.steps.append(best[:, 0] - best[:, 1] < _NEAR_TIE)
        return scores

    def has_tie(self, row: int, tokens: int) -> bool:
        """Return True if one of the row's first `tokens` steps had a tie."""
        return any(bool(step[row]) for step in self.steps[:tokens])


def _generate(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    **generation: Any,
) -> list[list[int]]:
    """Return the tokens that `generate` adds to each prompt, up to the token that ends the answer."""
    limit = table_size(model)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - 1)
        prompts = [ids[-(limit - max_new_tokens) :] for ids in prompts]
    width = max(map(len, prompts))
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    inputs = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False, **generation},
        )
    added: list[list[int]] = output[:, width:].tolist()
    return [_until_end(row, model.generation_config.eos_token_id) for row in added]


def _until_end(row: list[int], ends: int | list[int] | None) -> list[int]:
    """Return a row without the padding after its end."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return row[: next((place + 1 for place, token in enumerate(row) if token in stops), len(row))]
