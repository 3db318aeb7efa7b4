"""Content-addressed disk cache of loaded and tokenised rows.

Rows of files with equal bytes and equal settings are converted and tokenised only once. The cache is in a folder of the
`datasets` cache (HF_DATASETS_CACHE, by default ~/.cache/huggingface/datasets) and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.exact_json import ExactJson
from loraplus_hydra.data.rows import Rows
from loraplus_hydra.errors import UserError

_PACKAGE = Path(__file__).parents[1]


def cache_folder() -> Path:
    """Return the cache's folder. It is made if it doesn't exist.

    Raises UserError if it can't be made.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "loraplus_hydra"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: {reason}; name another folder for the cache: HF_DATASETS_CACHE=...") from error
    return folder


def digest(*parts: Any) -> str:
    """Return 32 hex digits that identify `parts` (JSON values), equal in every process."""
    text = json.dumps([_code_digest(), *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def _code_digest() -> str:
    """Return a text that identifies the code that reads and tokenises rows."""
    # Part of every key, because another version of the code may give other tokens and must not use older files.
    modules = sorted(path for room in ("data", "tasks") for path in (_PACKAGE / room).rglob("*.py"))
    code = hashlib.blake2b(b"".join(path.read_bytes() for path in modules), digest_size=8).hexdigest()
    return f"{code} {version('datasets')} {version('trl')}"


def file_digest(path: str | Path) -> str:
    """Return 32 hex digits that identify a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 32 hex digits that identify a tokenizer.

    The digits depend on vocabulary, rules, special tokens, the side that is cut, chat template, and the libraries'
    versions.
    """
    # datasets' own hash of a tokenizer changes once it has been used with truncation or padding.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    return digest(
        type(tokenizer).__name__,
        rules,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        [tokenizer.truncation_side, tokenizer.split_special_tokens],
        tokenizer.chat_template,
        [version(name) for name in ("transformers", "tokenizers")],
    )


def map_cached(
    rows: Rows,
    convert: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    *,
    features: Features,
    key: Mapping[str, Any],
) -> Rows:
    """Return `rows` converted by `convert(batch, indices)`: their columns become those of `features`.

    `key` must have everything except the rows on which the result depends. Streamed rows are converted when they are
    read, and are not cached.
    """
    arguments: dict[str, Any] = {"batched": True, "with_indices": True, "features": features}
    if isinstance(rows, Dataset):
        fingerprint = digest(rows._fingerprint, key, features.to_dict())
        arguments["new_fingerprint"] = fingerprint
        arguments["cache_file_name"] = str(cache_folder() / f"{fingerprint}.arrow")
        return rows.map(convert, remove_columns=rows.column_names, **arguments)

    def convert_packed(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = dict.fromkeys(name for row in batch["row"] for name in row)
        return convert({name: [row.get(name) for row in batch["row"]] for name in names}, indices)

    # Any row of a stream may have columns that the others don't have, so each row becomes one value to be removed.
    packed = rows.map(lambda row: {"row": row}, features=Features({"row": ExactJson()})).select_columns(["row"])
    return packed.map(convert_packed, remove_columns=["row"], **arguments)


def generate_cached(
    rows: Callable[..., Any], arguments: dict[str, Any], *, features: Features, key: Mapping[str, Any]
) -> Dataset:
    """Return the rows that the generator function `rows` yields, as a Dataset on disk.

    `key` must have everything on which the rows depend.
    """
    return Dataset.from_generator(
        rows, features=features, gen_kwargs=arguments, cache_dir=str(cache_folder()), fingerprint=digest(key)
    )
