"""Notes on rows that the tokenizer, the chat template or a limit of length changes."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, Features, List, Value

from loraplus_hydra.data.rows import ORIGIN
from loraplus_hydra.tasks.base import Base

_OTHER_TEMPLATE = "give another one (+task.args.chat_template_path=template.jinja)"
# Properties of encoded rows, fields of `Encoded`, that only notes report.
_FLAGS = {
    "merged": "the prompt's end and the completion's beginning share a token, which counts as the completion's: end "
    "prompts, or begin completions, with a space or a line's end.",
    "unasked": "the chat template ends the prompt with text that the row lacks, so that answers are asked for in "
    f"another way than they are learnt: {_OTHER_TEMPLATE}.",
    "changed": "the chat template leaves out or changes text of the assistant, which is not learnt: take it out of the "
    f"rows, or {_OTHER_TEMPLATE}.",
    "endless": "no token that ends the answer carries loss, so that the model may not learn to stop: "
    f"{_OTHER_TEMPLATE}.",
    "unanswered": "the conversation ends without an answer of the assistant.",
}
REPORTED = Features(
    {**{name: Value("bool") for name in _FLAGS}, "unread": List(Value("string")), "length": Value("int32")}
)


def template_notes(encoded: Dataset, rows: Dataset, split: str) -> list[str]:
    """Return notes on rows that the tokenizer or the chat template changes.

    `encoded` has the columns of REPORTED.
    """
    notes = [
        note
        for name, text in _FLAGS.items()
        if (note := rows_note([number for number, value in enumerate(encoded[name]) if value], rows, split, text))
    ]
    if unread := sorted({key for keys in encoded["unread"] for key in keys}):
        notes.append(f"Not used by the chat template: {', '.join(unread)} ({split} rows)")
    return notes


def rows_note(numbers: Sequence[int], rows: Dataset, split: str, text: str) -> str:
    """Return a note on the rows with these numbers, naming the first; empty if there is none."""
    if not numbers:
        return ""
    first = rows[numbers[0]][ORIGIN] if ORIGIN in rows.column_names else f"row {numbers[0] + 1}"
    return f"In {len(numbers):,} of {len(rows):,} {split} rows (first: {first}) {text}"


def cut_note(cut: int, total: int, split: str, limit: int | None, *, keep_end: bool = False) -> list[str]:
    """Return the note on rows that are longer than `limit` tokens, if there is any."""
    lost = "beginnings" if keep_end else "ends"
    return (
        [f"{cut:,} of {total:,} {split} rows are longer than {limit} tokens: their {lost} are cut off."] if cut else []
    )


def stretched_note(lengths: Sequence[int], split: str, limit: int | None, base: Base | None) -> list[str]:
    """Return the note on rows that are longer than a rotary model was trained for, if there is any.

    Rows are cut to `limit`.
    """
    trained = None if base is None else base.trained_positions
    if trained is None or (limit is not None and limit <= trained):
        return []
    long = sum(length > trained for length in lengths)
    what = f"are longer than the {trained:,} tokens that the model was made for (max_position_embeddings)"
    return [f"{long:,} of {len(lengths):,} {split} rows {what}; they are not cut there."] if long else []
