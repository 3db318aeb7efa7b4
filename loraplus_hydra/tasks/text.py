"""Continuation of plain text: documents become blocks of equal length, without padding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from numpy.typing import NDArray
from omegaconf import DictConfig
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from loraplus_hydra.data.cache import digest, generate_cached, map_cached, tokenizer_digest
from loraplus_hydra.data.rows import CONTINUED, CONTINUES, SPLITS, Rows, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.base import Base, longest_input
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import batch_rows, require_columns, text_in, unused_columns_note
from loraplus_hydra.tasks.tokens import IGNORED, tokens_put_first

# A text with more characters is cut before it is tokenised, because a tokenizer's result takes much memory.
_LONG = 2**20
# Where a long text is cut, best first: a line that begins with a word, and white space before a word
_CUTS = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?=\s\S)"))

# Whether a row of tokens begins and ends its document, and the document's file; empty if unknown
_DOCUMENT = {"begins": Value("bool"), "ends": Value("bool"), "file": Value("string")}


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    block_size: int,
    base: Base | None = None,
) -> Examples:
    """Return the text in `data.text_column` in blocks of `block_size` tokens.

    A document is one row, or several rows that the loader marks. An end-of-text token follows each document. It has no
    loss if the document's last rows are left out. Blocks continue across documents. The last block of a split is
    shorter, because no token is dropped. A block's first token has no loss, because no token comes before it. Raises
    ConfigErrors.
    """
    column = data.get("text_column", "text")
    if column is None:
        fix = "set the column with the text: +data.text_column=..."
        raise ConfigErrors([Problem("data.text_column", "is not set", fix)])
    require_columns(rows, {"data.text_column": column})
    _check_block_size(block_size, longest_input(tokenizer, base))
    key = {"task": "text", "tokenizer": tokenizer_digest(tokenizer), "column": column}
    blocks = {split: _blocks_of(rows[split], column, tokenizer, split, block_size, key) for split in SPLITS}
    prompts, answers = _samples(blocks["eval"], tokenizer, task.samples, task.sample_tokens)
    return Examples(
        train=blocks["train"],
        eval=blocks["eval"],
        prompts=prompts,
        rendered=prompts,
        notes=tuple(unused_columns_note(rows, [column])),
        special_tokens=True,
        references=answers,
        # This collator pads the shorter last block, and its labels with -100. The collator for language models would
        # remove the loss of every end-of-text token that is also the pad token.
        trainer_arguments={"data_collator": DataCollatorForSeq2Seq(tokenizer)},
    )


def cut_into_blocks(parts: Iterable[NDArray[np.int32]], size: int) -> Iterator[NDArray[np.int32]]:
    """Yield the tokens of all parts in blocks of `size`. The last block has the remaining tokens."""
    rest: NDArray[np.int32] | None = None
    for part in parts:
        rest = part if rest is None else np.concatenate([rest, part])
        end = len(rest) // size * size
        yield from rest[:end].reshape(-1, size, *rest.shape[1:])
        rest = rest[end:]
    if rest is not None and len(rest):
        yield rest


def _check_block_size(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        what = f"{size} tokens are more than the model's maximum, {limit}"
        raise ConfigErrors([Problem("task.block_size", what, f"set {limit} or fewer")])


def _blocks_of(
    rows: Rows, column: str, tokenizer: PreTrainedTokenizerBase, split: str, size: int, key: dict[str, Any]
) -> Any:
    """Return the split's blocks, with the columns input_ids and labels.

    For streamed rows the result is an IterableDataset. Raises ConfigErrors.
    """
    convert = _converter(column, tokenizer, split)
    features = Features({**_features("input_ids"), **_DOCUMENT})
    tokens = map_cached(rows, convert, features=features, key=key)
    arguments = {"tokens": tokens, "size": size, "end": tokenizer.eos_token_id}
    first = next(_blocks(**arguments), None)
    if first is None or len(first["input_ids"]) < 2:
        raise ConfigErrors([Problem("data", f"the {split} rows have no text to continue", "use more text")])
    features = _features("input_ids", "labels")
    if is_streamed(tokens):
        return IterableDataset.from_generator(_blocks, features, gen_kwargs=arguments)
    blocks_key = {"blocks": digest(tokens._fingerprint, key), "size": size}
    return generate_cached(_blocks, arguments, features=features, key=blocks_key)


def _features(*names: str) -> Features:
    return Features({name: List(Value("int32")) for name in names})


def _blocks(tokens: Any, size: int, end: int | None) -> Iterator[dict[str, Any]]:
    for block in cut_into_blocks(_parts(tokens, end), size):
        input_ids, labels = block.T.tolist()
        yield {"input_ids": input_ids, "labels": labels}


def _parts(tokens: Any, end: int | None) -> Iterator[NDArray[np.int32]]:
    """Yield (token, label) pairs of all rows, with the token `end` between pieces of different documents."""
    before = None
    for row in tokens:
        if end is not None and before is not None and not (before["ends"] or _follows(row, before)):
            # The rest of the document before is held out or not drawn. What follows needs a boundary, but the model
            # must not learn to stop in mid-document.
            yield np.array([[end, IGNORED]], dtype=np.int32)
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        yield np.stack([ids, ids], axis=1)
        before = row


def _follows(piece: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return True if a piece continues the document of the piece before it.

    Neither piece's own mark is enough: the rows between them may be left out. If they are pieces of one file, there is
    no row between them, because only a file's first or last rows are left out.
    """
    return not (before["ends"] or piece["begins"]) and before["file"] == piece["file"]


def _converter(column: str, tokenizer: PreTrainedTokenizerBase, split: str) -> Any:
    """Return the function that turns a batch into rows of tokens, one for each document.

    A document that continues over several batches has a row in each of them. If its first rows are left out, it has no
    beginning-of-text token, and if its last rows are left out, no end-of-text token.
    """
    beginning = tokens_put_first(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts: list[str] = []
        parts: list[dict[str, Any]] = []
        for row, place in batch_rows(batch, indices, split):
            text = text_in(row, column, place)
            begins, ends = not row.get(CONTINUED, False), not row.get(CONTINUES, False)
            part = {"begins": begins, "ends": ends, "file": place.rpartition(", line ")[0]}
            # Rows are joined before they are tokenised, because a word's tokens can differ at the beginning of a text.
            if parts and _follows(part, parts[-1]):
                texts[-1] += text
                parts[-1]["ends"] = ends
            else:
                texts.append(text)
                parts.append(part)
        ids = [
            # A text may already begin with the one token, or end with the other.
            beginning * (part["begins"] and each[:1] != beginning) + each + end * (part["ends"] and each[-1:] != end)
            for each, part in zip(_ids(texts, tokenizer), parts, strict=True)
        ]
        return {"input_ids": ids, **{name: [part[name] for part in parts] for name in _DOCUMENT}}

    return convert


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return each text's tokens. Long texts are tokenised in pieces, which need little memory."""
    if all(len(text) <= _LONG for text in texts):
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
    return [
        [token for piece in pieces(text, _LONG) for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        for text in texts
    ]


def pieces(text: str, size: int) -> Iterator[str]:
    """Yield a text in pieces of `size` to twice as many characters; the last can be shorter."""
    start = 0
    while len(text) - start > 2 * size:
        found = (cut.search(text, start + size, start + 2 * size) for cut in _CUTS)
        end = next((place.start() for place in found if place), start + size)
        yield text[start:end]
        start = end
    yield text[start:]


def _samples(
    blocks: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (beginnings, continuations) of held-out blocks, as text."""
    prompts, answers = [], []
    for row in blocks.take(min(count, len(blocks))):
        ids = row["input_ids"]
        shown = max(1, min(len(ids) // 2, 64))
        prompts.append(tokenizer.decode(ids[:shown]))
        answers.append(tokenizer.decode(ids[shown : shown + tokens]))
    return tuple(prompts), tuple(answers)
