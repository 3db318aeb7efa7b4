"""The tokenizer with a pad token and the config's new tokens."""

from __future__ import annotations

from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loraplus_hydra.config.locations import model_location
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, nearest, refuse
from loraplus_hydra.models.base_model import hub_arguments, location_advice, missing_folder_problem

# Tokens that models reserve for padding or leave unused, best first. The first that the vocabulary has is used.
SPARE_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",  # Llama 3.1 and later
    "<|reserved_special_token_0|>",  # Llama 3
    "[control_8]",  # Mistral v0.3
    "<unk>",  # Llama 2, Mistral v0.1; byte fallback never gives it
)


def load_tokenizer(model: DictConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, add `model.add_tokens`, and set a pad token if it has none.

    The pad token is `model.pad_token`. Without it, the tokenizer's own is used, then one of `SPARE_TOKENS`, then the
    end-of-text token. Raises ConfigErrors.
    """
    path = model.tokenizer or model.path
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_location(path), **hub_arguments(model, path)
        )
        tokenizer("a")  # using the tokenizer reveals settings of a wrong type
    except Exception as error:  # transformers and tokenizers raise many types for a broken file
        key = "model.tokenizer" if model.tokenizer else "model.path"
        what = f"no tokenizer can be loaded from {path}: {first_line(error)}"
        missing = missing_folder_problem(key, path)
        raise ConfigErrors([missing or Problem(key, what, location_advice(path))]) from error
    refuse([*_set_pad_token(tokenizer, model), *_add_tokens(tokenizer, model)])
    return tokenizer


def new_token_ids(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> list[int]:
    """Return the ids of `model.add_tokens` in a tokenizer from `load_tokenizer`."""
    ids = tokenizer.convert_tokens_to_ids(list(model.add_tokens))
    assert isinstance(ids, list)
    return ids


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> list[Problem]:
    vocabulary = tokenizer.get_vocab()
    if model.pad_token is not None:
        if model.pad_token not in vocabulary:
            hint = nearest(model.pad_token, [token for token in vocabulary if token[:1] in "<["])
            what = f"'{model.pad_token}' is not a token of the tokenizer{hint}"
            return [Problem("model.pad_token", what, "use a token of the tokenizer")]
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token is not None:
        return []
    spare = [token for token in SPARE_TOKENS if token in vocabulary and token != tokenizer.eos_token]
    if not spare and tokenizer.eos_token is None:
        what = f"the tokenizer of {model.tokenizer or model.path} has neither a pad nor an eos token"
        return [Problem("model.pad_token", what, "set it to a token that never occurs in your texts")]
    tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return []


def _add_tokens(tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> list[Problem]:
    vocabulary = tokenizer.get_vocab()
    known = [token for token in model.add_tokens if token in vocabulary]
    repeated = sorted({token for token in model.add_tokens if list(model.add_tokens).count(token) > 1})
    if any(not token.strip() for token in model.add_tokens):
        return [Problem("model.add_tokens", "a token must not be empty or only spaces", "leave it out")]
    if known or repeated:
        what = f"{', '.join(known)} is a token already" if known else f"{', '.join(repeated)} is listed twice"
        return [Problem("model.add_tokens", what, "leave it out")]
    if model.add_tokens:
        tokenizer.add_tokens(list(model.add_tokens))
    return []
