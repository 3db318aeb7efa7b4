"""Use of the tokenizer's chat template, which may be untrusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplus_hydra.errors import UserError, first_line
from loraplus_hydra.io.time_limit import time_limit

_SECONDS = 10.0  # time limit in seconds for one conversation


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **arguments: Any) -> Any:
    """Call the tokenizer's `apply_chat_template`.

    Raises UserError if the template fails or takes too long.
    """
    try:
        with time_limit(_SECONDS):
            return tokenizer.apply_chat_template(list(messages), **arguments)
    except Exception as error:  # a template can raise its own errors, Jinja's, and Python's
        raise UserError(f"the chat template fails: {first_line(error)}") from None
