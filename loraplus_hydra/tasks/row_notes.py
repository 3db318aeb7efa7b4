"""Notes on rows that the tokenizer, the chat template or a length limit changes."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, Features, List, Value

from loraplus_hydra.data.rows import ORIGIN
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.base import Base

_OTHER_TEMPLATE = (
    "use another template (chat_template.jinja in the tokenizer's folder; for task=sft also "
    "+task.args.chat_template_path=template.jinja)"
)
# Properties of encoded rows (fields of `Encoded`) that are used only for notes.
_FLAGS = {
    "merged": "the end of the prompt and the beginning of the completion are in one token, which has loss: end "
    "prompts, or begin completions, with a space or a line break.",
    "unasked": "the chat template ends the prompt with text that the row doesn't have, so prompts differ between "
    f"training and use: {_OTHER_TEMPLATE}.",
    "changed": "the chat template omits or changes text of the assistant, so this text is not learnt: remove it from "
    f"the rows, or {_OTHER_TEMPLATE}.",
    "endless": f"no token that ends the answer has loss, so the model may not learn to stop: {_OTHER_TEMPLATE}.",
    "unanswered": "the conversation ends without an answer of the assistant.",
}
REPORTED = Features(
    {**{name: Value("bool") for name in _FLAGS}, "unread": List(Value("string")), "length": Value("int32")}
)


def template_notes(encoded: Dataset, rows: Dataset, split: str) -> list[str]:
    """Return notes on rows that the tokenizer or the chat template changes.

    `encoded` has the columns of REPORTED.
    """
    # A slice of a column is read at once; to iterate over a column reads row by row, which takes 300 times as long.
    notes = [
        note
        for name, text in _FLAGS.items()
        if (note := rows_note([number for number, value in enumerate(encoded[name][:]) if value], rows, split, text))
    ]
    if unread := sorted({key for keys in encoded["unread"][:] for key in keys}):
        notes.append(f"Not used by the chat template: {', '.join(unread)} ({split} rows)")
    return notes


def rows_note(numbers: Sequence[int], rows: Dataset, split: str, text: str) -> str:
    """Return a note on the rows with these numbers, with the first row's place; empty without rows."""
    if not numbers:
        return ""
    first = rows[numbers[0]][ORIGIN] if ORIGIN in rows.column_names else f"row {numbers[0] + 1}"
    return f"In {len(numbers):,} of {len(rows):,} {split} rows (first: {first}) {text}"


def cut_note(cut: int, total: int, split: str, limit: int | None, *, keep_end: bool = False) -> list[str]:
    """Return a note if rows are longer than `limit` tokens."""
    lost = "beginnings" if keep_end else "ends"
    return (
        [f"{cut:,} of {total:,} {split} rows are longer than {limit} tokens: their {lost} are cut off."] if cut else []
    )


def omitted_note(omitted: int, total: int, split: str, limit: int) -> list[str]:
    """Return a note if cut rows have no token left to learn.

    Raises ConfigErrors if no row has one.
    """
    if omitted == total:
        what = f"after cutting to {limit} tokens, no {split} row has a token to learn"
        raise ConfigErrors([Problem("task.args.max_length", what, "allow more tokens")])
    return [f"{omitted:,} of these have no token left to learn and are omitted."] if omitted else []


def stretched_note(lengths: Sequence[int], split: str, limit: int | None, base: Base | None) -> list[str]:
    """Return a note if rows are longer than the texts on which a rotary model was trained.

    Rows are cut to `limit`.
    """
    trained = None if base is None else base.trained_positions
    if trained is None or (limit is not None and limit <= trained):
        return []
    long = sum(length > trained for length in lengths)
    what = f"are longer than the {trained:,} tokens for which the model was trained (max_position_embeddings)"
    return [f"{long:,} of {len(lengths):,} {split} rows {what}; these rows are not cut to this length."] if long else []
