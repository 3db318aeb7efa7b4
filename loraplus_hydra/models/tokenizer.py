"""The tokenizer, with a pad token and the new tokens that the config asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplus_hydra.config.locations import model_location
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, nearest
from loraplus_hydra.models.base_model import hub_arguments, no_folder, where_models_are

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

# Tokens that publishers keep for padding or for no use, best first; each is taken only where the vocabulary has it.
SPARE_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",  # Llama 3.1 and later
    "<|reserved_special_token_0|>",  # Llama 3
    "[control_8]",  # Mistral v0.3
    "<unk>",  # Llama 2, Mistral v0.1: byte fallback never yields it
)


def load_tokenizer(model: DictConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with `model.add_tokens` in it and a pad token.

    Where it has no pad token and `model.pad_token` names none, a token that never occurs in text stands in
    (`SPARE_TOKENS`); only where there is none either, the end-of-text token does. Raises ConfigErrors.
    """
    from transformers import AutoTokenizer

    where = model.tokenizer or model.path
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_location(where), **hub_arguments(model)
        )
        tokenizer("a")  # some settings of a wrong type are only met in use
    except Exception as error:  # of a broken file transformers and tokenizers raise anything
        key = "model.tokenizer" if model.tokenizer else "model.path"
        what = f"no tokenizer can be loaded from {where}: {first_line(error)}"
        raise ConfigErrors([no_folder(key, where) or Problem(key, what, where_models_are(where))]) from error
    problems = [*_set_pad_token(tokenizer, model), *_add_tokens(tokenizer, model)]
    if problems:
        raise ConfigErrors(problems)
    return tokenizer


def new_token_ids(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> list[int]:
    """Ids of `model.add_tokens` in a tokenizer that `load_tokenizer` made."""
    ids = tokenizer.convert_tokens_to_ids(list(model.add_tokens))
    assert isinstance(ids, list)
    return ids


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> list[Problem]:
    vocabulary = tokenizer.get_vocab()
    if model.pad_token is not None:
        if model.pad_token not in vocabulary:
            hint = nearest(model.pad_token, [token for token in vocabulary if token[:1] in "<["])
            return [
                Problem(
                    "model.pad_token", f"'{model.pad_token}' is no token of the tokenizer{hint}", "name one that is"
                )
            ]
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token is not None:
        return []
    spare = [token for token in SPARE_TOKENS if token in vocabulary and token != tokenizer.eos_token]
    if not spare and tokenizer.eos_token is None:
        what = f"the tokenizer of {model.tokenizer or model.path} has neither a pad nor an eos token"
        return [Problem("model.pad_token", what, "name a token that never occurs in your texts")]
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return []


def _add_tokens(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> list[Problem]:
    vocabulary = tokenizer.get_vocab()
    known = [token for token in model.add_tokens if token in vocabulary]
    repeated = sorted({token for token in model.add_tokens if list(model.add_tokens).count(token) > 1})
    if any(not token.strip() for token in model.add_tokens):
        return [Problem("model.add_tokens", "a token without any text in it is none", "leave it out")]
    if known or repeated:
        what = f"{', '.join(known)} is a token already" if known else f"{', '.join(repeated)} stands there twice"
        return [Problem("model.add_tokens", what, "leave it out")]
    if model.add_tokens:
        tokenizer.add_tokens(list(model.add_tokens))
    return []
