"""The rows of single tokens that an adapter trains, compared with a stored adapter's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.errors import Problem
from loraplus_hydra.io.read import read_json, read_or
from loraplus_hydra.models.adapter_files import KEY, StoredAdapter, stored_adapter
from loraplus_hydra.models.tokenizer import new_token_ids

FIELD = "trainable_token_indices"  # only some PEFT configs have this field
_TOKENS_KEY = "model.add_tokens"


def row_differences(
    stored: PeftConfig, configured: PeftConfig, embedding: str, new_tokens: Sequence[int]
) -> list[Problem]:
    """Return a Problem if the configured rows, with those of new tokens, aren't the stored adapter's rows.

    `embedding` is the input embedding's name. Which tokens are new ones is compared by `new_token_problems`.
    """
    then, now = _rows(stored, embedding), _rows(configured, embedding)
    for layer in then.keys() | now.keys():
        others = then.get(layer, set()) - now.get(layer, set())
        if not now.get(layer, set()) <= then.get(layer, set()) or len(others) > len(new_tokens):
            what = f"is {getattr(configured, FIELD)}, but {getattr(stored, FIELD)} in the adapter at {KEY}"
            return [Problem(f"adapter.{FIELD}", what, "adapter=existing")]
    return []


def new_token_problems(path: str, tokenizer: PreTrainedTokenizerBase, model: DictConfig) -> list[Problem]:
    """Return a Problem if `model.add_tokens` aren't the new tokens of the adapter at `path`.

    `tokenizer` has the new tokens. The adapter's own tokens are known if a tokenizer is stored with it.
    """
    stored = stored_adapter(path)
    layers = [*_rows(stored.config, "").values()]
    known, ids = _stored_tokens(stored), new_token_ids(tokenizer, model)
    given = dict(zip(ids, model.add_tokens, strict=True))
    if all(known.get(each, token) == token and all(each in rows for rows in layers) for each, token in given.items()):
        return []
    first = len(tokenizer) - len(given)  # the base's own tokens have smaller ids
    trained = sorted({each for rows in layers for each in rows if each >= first})
    if not trained:
        return [Problem(_TOKENS_KEY, f"the adapter at {KEY} has no rows for new tokens", "use []")]
    names, numbers = [known.get(each, "?") for each in trained], ", ".join(map(str, trained))
    what = f"the adapter was trained with {', '.join(names)} (ids {numbers})"
    if "?" in names:
        what, names = f"the adapter was trained with the new tokens of ids {numbers}", ["the same tokens in this order"]
    return [Problem(_TOKENS_KEY, what, f"use [{', '.join(names)}]")]


def _rows(config: PeftConfig, embedding: str) -> dict[str, set[int]]:
    """Return the ids by the last part of their layer's name. PEFT trains those of a list in the embedding."""
    given = getattr(config, FIELD, None) or {}
    named = given if isinstance(given, Mapping) else {embedding: given}
    found: dict[str, set[int]] = {}
    for name, ids in named.items():
        found.setdefault(name.rpartition(".")[2], set()).update(ids)
    return found


def _stored_tokens(stored: StoredAdapter) -> dict[int, str]:
    """Return the added tokens of the tokenizer in the adapter's folder by id; empty without a tokenizer."""
    # Read as JSON, because the folder is untrusted and a tokenizer's config can name code.
    added: Any = read_or({}, read_json, stored.folder / "tokenizer.json").get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {token["id"]: str(token["content"]) for token in tokens if {"id", "content"} <= token.keys()}
