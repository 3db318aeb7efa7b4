"""Continuation of plain text: documents -> blocks of as many tokens each, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from loraplus_hydra.data.cache import digest, generate_cached, map_cached, tokenizer_digest
from loraplus_hydra.data.rows import CONTINUED, CONTINUES, SPLITS, all_columns, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.rows import batch_rows, require_columns, text_in

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features
    from numpy.typing import NDArray
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

    from loraplus_hydra.data.rows import Rows

_NO_LIMIT = 1_000_000  # tokenizers that know no limit state a far larger number


def examples(
    rows: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: DictConfig, data: DictConfig, *, block_size: int
) -> Examples:
    """The text in `data.text_column`, document after document, in blocks of `block_size` tokens.

    An end-of-text token stands behind each document (a row, or as many rows as the loader says). Blocks run across
    documents; the last block of a split is shorter and is kept, so that no token is lost. A block's first token carries
    no loss, since nothing in the block comes before it. Raises ConfigErrors.
    """
    column = data.get("text_column")
    if column is None:
        raise ConfigErrors(
            [Problem("data.text_column", "is not set", "name the column with the text: +data.text_column=...")]
        )
    require_columns(rows, {"data.text_column": column})
    _check_block_size(block_size, tokenizer)
    key = {"task": "text", "tokenizer": tokenizer_digest(tokenizer), "column": column}
    blocks = {split: _blocks_of(rows[split], column, tokenizer, split, block_size, key) for split in SPLITS}
    prompts, answers = _samples(blocks["eval"], tokenizer, task.samples, task.sample_tokens)
    from transformers import DataCollatorForSeq2Seq

    return Examples(
        train=blocks["train"],
        eval=blocks["eval"],
        prompts=prompts,
        rendered=prompts,
        references=answers,
        # Pads the shorter last block, its labels with -100. The collator for language models would take the loss from
        # every end-of-text token where that is the pad token, too.
        trainer_arguments={"data_collator": DataCollatorForSeq2Seq(tokenizer)},
    )


def cut_into_blocks(parts: Iterable[NDArray[np.int32]], size: int) -> Iterator[NDArray[np.int32]]:
    """The tokens of all parts in their order, `size` at a time; the last block has what is left."""
    kept: NDArray[np.int32] = np.empty(0, dtype=np.int32)
    for part in parts:
        kept = np.concatenate([kept, part])
        whole = len(kept) // size * size
        yield from kept[:whole].reshape(-1, size)
        kept = kept[whole:]
    if len(kept):
        yield kept


def _check_block_size(size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    limit = tokenizer.model_max_length
    if limit < _NO_LIMIT and size > limit:
        what = f"{size} tokens are more than the {limit} that the model was made for"
        raise ConfigErrors([Problem("task.block_size", what, f"{limit} or fewer")])


def _blocks_of(
    rows: Rows, column: str, tokenizer: PreTrainedTokenizerBase, split: str, size: int, key: dict[str, Any]
) -> Any:
    """The split's blocks, with the columns input_ids and labels: a Dataset, or an IterableDataset of streamed rows."""
    from datasets import IterableDataset

    convert = _converter(column, tokenizer, split)
    tokens = map_cached(rows, convert, columns=all_columns(rows), features=_features("input_ids"), key=key)
    first = next(_blocks(tokens, size), None)
    if first is None or len(first["input_ids"]) < 2:
        raise ConfigErrors([Problem("data", f"the {split} rows hold no text to go on with", "give more of it")])
    features = _features("input_ids", "labels")
    if is_streamed(tokens):
        return IterableDataset.from_generator(_blocks, features, gen_kwargs={"tokens": tokens, "size": size})
    blocks_key = {"blocks": digest(tokens._fingerprint, key), "size": size}
    return generate_cached(_blocks, {"tokens": tokens, "size": size}, features=features, key=blocks_key)


def _features(*names: str) -> Features:
    from datasets import Features, List, Value

    return Features({name: List(Value("int32")) for name in names})


def _blocks(tokens: Any, size: int) -> Iterator[dict[str, Any]]:
    parts = (np.asarray(row["input_ids"], dtype=np.int32) for row in tokens)
    for block in cut_into_blocks(parts, size):
        yield {"input_ids": block.tolist(), "labels": block.tolist()}


def _converter(column: str, tokenizer: PreTrainedTokenizerBase, split: str) -> Any:
    """Joins the rows of a document (those of a batch at least) before they are tokenised, so that words at a row's
    beginning come out as inside the text."""
    begins = _beginning(tokenizer)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts: list[str] = []
        begun: list[bool] = []
        finished: list[bool] = []
        for row, place in batch_rows(batch, indices, split):
            text = text_in(row, column, place)
            if texts and not finished[-1]:
                texts[-1] += text
            else:
                texts.append(text)
                begun.append(not row.get(CONTINUED, False))
                finished.append(False)
            finished[-1] = not row.get(CONTINUES, False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {
            "input_ids": [
                [*(begins if begin else []), *part, *(ends if end else [])]
                for part, begin, end in zip(ids, begun, finished, strict=True)
            ]
        }

    return convert


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts ahead of a text: a beginning-of-text token, or nothing."""
    alone = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if alone and alone[0] == tokenizer.bos_token_id else []


def _samples(
    blocks: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Beginnings of held-out blocks, and how the text goes on."""
    prompts, answers = [], []
    for row in blocks.take(min(count, len(blocks))):
        ids = row["input_ids"]
        seen = max(1, min(len(ids) // 2, 64))
        prompts.append(tokenizer.decode(ids[:seen]))
        answers.append(tokenizer.decode(ids[seen : seen + tokens]))
    return tuple(prompts), tuple(answers)
