"""A column's type for JSON values, and the text that stores them."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from datasets import Json
from datasets.features.features import register_feature
from datasets.utils.json import ujson_loads

# Begins a text that `datasets` can't read. White space, so the text is still JSON, and no value begins like this.
_UNREADABLE = "\r\t\r\t"


@dataclass
class ExactJson(Json):
    """The type Json of `datasets`, but values are read as they were written.

    `datasets` itself rounds numbers, 1e-12 to 0, and can't read whole numbers of more than 64 bits.
    """

    _type: str = field(default="ExactJson", init=False, repr=False)

    def encode_example(self, example_data: Any) -> str | None:
        """Return a value as JSON text. A text that is JSON is returned unchanged."""
        if example_data is None:
            return None
        if isinstance(example_data, str):
            with suppress(ValueError, RecursionError):
                json.loads(example_data)
                return example_data
        return json_text(example_data)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        """Return the value of a JSON text."""
        if example_data is None:
            return None
        value = json.loads(example_data)
        # `datasets` stores a text that it can't read as JSON of this text.
        return json.loads(value) if isinstance(value, str) and value.startswith(_UNREADABLE) else value


def json_text(value: Any) -> str:
    """Return a value as the JSON text that a column of ExactJson stores.

    A function for `Dataset.map` must return this text, because `datasets` would convert the value itself.
    """
    text = json.dumps(value, default=_named)
    try:
        ujson_loads(text)
    except ValueError:
        return _UNREADABLE + text
    return text


def _named(value: Any) -> dict[str, str]:
    """Return a date, bytes or the like as an object, because it must not become a text to learn."""
    return {type(value).__name__: str(value)}


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `datasets` warns that this function may change
    register_feature(ExactJson, "ExactJson")
