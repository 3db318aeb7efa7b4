"""What was read and tokenised once is kept on disk, by content: the same bytes under the same settings are done once.

Everything is in a folder of the `datasets` cache (HF_DATASETS_CACHE, by default ~/.cache/huggingface/datasets) and
may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

    from loraplus_hydra.data.rows import Rows

# Part of every key: a change in how rows are read or tokenised makes what was kept before useless. Count it up then.
FORMAT = 1
_CHUNK = 1 << 20  # bytes of a file hashed at a time


def cache_folder() -> Path:
    """Where it is kept; made if it isn't there. Raises UserError when it can't be."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "loraplus_hydra"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: {reason}; name a folder for what is kept: HF_DATASETS_CACHE=...") from error
    return folder


def digest(*parts: Any) -> str:
    """32 hex digits that name `parts` (what JSON can hold), equal in every process."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: str | Path) -> str:
    """32 hex digits that name a file's bytes."""
    found = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits that name what a tokenizer makes of a text: vocabulary, rules, special tokens, chat template.

    datasets' own hash of a tokenizer changes once it has been used with truncation or padding.
    """
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
        tokenizer.chat_template,
        [version(name) for name in ("transformers", "tokenizers")],
    )


def converted(
    rows: Rows,
    convert: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    *,
    columns: list[str],
    features: Features,
    key: Mapping[str, Any],
) -> Rows:
    """`rows` after `convert(batch, indices)`, which replaces the `columns` by those of `features`.

    `key` holds all that the result depends on besides the rows. Streamed rows are converted as they come.
    """
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return rows.map(convert, batched=True, with_indices=True, remove_columns=columns, features=features)
    fingerprint = digest(rows._fingerprint, key)
    return rows.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=features,
        new_fingerprint=fingerprint,
        cache_file_name=str(cache_folder() / f"{fingerprint}.arrow"),
    )


def generated(
    rows: Callable[..., Any], arguments: dict[str, Any], *, features: Features, key: Mapping[str, Any]
) -> Dataset:
    """The rows that a generator function yields, as a Dataset on disk; `key` holds all that they depend on."""
    from datasets import Dataset

    return Dataset.from_generator(
        rows, features=features, gen_kwargs=arguments, cache_dir=str(cache_folder()), fingerprint=digest(key)
    )
