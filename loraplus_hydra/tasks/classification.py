"""Classification of texts or pairs of texts: one label, several labels, or a number (regression)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value
from omegaconf import DictConfig
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from loraplus_hydra.data.cache import map_cached, tokenizer_digest
from loraplus_hydra.data.rows import SPLITS, declared_names, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem, nearest
from loraplus_hydra.tasks.base import Base, least, longest_input
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.labels import Labels, find_labels, similar_note
from loraplus_hydra.tasks.metrics import METRICS, MULTI, SINGLE, metrics_of
from loraplus_hydra.tasks.row_notes import cut_note
from loraplus_hydra.tasks.rows import batch_rows, require_columns, text_in, unused_columns_note
from loraplus_hydra.tasks.tokens import pad_as_class


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    problem_type: str | None = None,
    max_length: int | None = None,
    new_head: bool = False,
    base: Base | None = None,
) -> Examples:
    """Return tokens and labels of rows with one or two texts and a label.

    The columns are `data.text_column`, `data.text_pair_column` (unless null) and `data.label_column`. If `problem_type`
    is None, the labels decide it. The labels have the order of the trained head of `base`, unless `new_head` replaces
    it. Texts are cut to `max_length` tokens (None: the model's maximum). The examples' `model_arguments` set the size
    and the names of the model's head. Raises ConfigErrors.
    """
    text, label, pair = _columns(rows, data)
    # Held-out rows are drawn, too. Without their labels, the labels would depend on the seed.
    drawn = any(name in data and data[name] is None for name in ("eval", "eval_split"))
    sampled = drawn or data.get("max_samples") is not None
    labels = find_labels(rows, label, problem_type, sampled=sampled, base=None if new_head else base)
    _check_metric(task, labels)
    limit = least(max_length, longest_input(tokenizer, base))
    pad_as_class(tokenizer)
    encoder = _Encoder(text, pair, labels, tokenizer, limit)
    encoded = {split: encoder.encode(rows[split], split) for split in SPLITS}
    cut = {split: sum(split_rows["cut"][:]) for split, split_rows in encoded.items()}
    return Examples(
        train=encoded["train"].remove_columns("cut"),
        eval=encoded["eval"].remove_columns("cut"),
        trainer_arguments={
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": metrics_of(labels.problem_type),
        },
        # A causal model classifies by the last token of a text, which it finds with the pad token's id.
        model_arguments=labels.model_arguments() | {"pad_token_id": tokenizer.pad_token_id},
        notes=_head_note(labels, None if new_head else base)
        + similar_note(labels.names)
        + tuple(unused_columns_note(rows, [text, label, data.get("text_pair_column") or ""]))
        + tuple(note for split in SPLITS for note in cut_note(cut[split], len(encoded[split]), split, limit)),
    )


def _head_note(labels: Labels, base: Base | None) -> tuple[str, ...]:
    """Return a note about a trained head: its outputs are named after the rows' labels, or don't fit them."""
    outputs = 0 if base is None else len(base.labels) or base.unnamed_outputs
    needed = len(labels.names) or 1  # a regression has one output
    if base is None or not outputs:
        return ()
    if outputs != needed:
        return (f"The model's trained head has {outputs} outputs, and {needed} are needed: a new head replaces it.",)
    if base.labels or not labels.names or labels.names == tuple(map(str, range(outputs))):
        return ()
    names = ", ".join(labels.names)
    return (
        f"The model's trained head has no names for its outputs. The rows' labels name them in this order: {names}.",
    )


def _columns(rows: DatasetDict, data: DictConfig) -> tuple[str, str, str | None]:
    """Return the columns of the text, of the label and of the second text.

    Raises ConfigErrors for columns that don't exist and for streamed rows.
    """
    # For a user's own callable, the keys of columns with the usual names may be missing.
    text, label, pair = data.get("text_column", "text"), data.get("label_column", "label"), data.get("text_pair_column")
    wanted = {"data.text_column": text, "data.label_column": label} | ({"data.text_pair_column": pair} if pair else {})
    if missing := [key for key, column in wanted.items() if column is None]:
        raise ConfigErrors([Problem(key, "is not set", f"set the column's name: +{key}=...") for key in missing])
    require_columns(rows, wanted)
    if any(is_streamed(rows[split]) for split in SPLITS):
        what = "the labels of streamed rows are unknown before the rows are read"
        raise ConfigErrors([Problem("data.streaming", what, "set it to false")])
    # GLUE has this column in every task. In tasks without a second text, the column's type is null.
    is_null = pair and getattr(rows["train"].features[pair], "dtype", None) == "null"
    return text, label, None if is_null else pair


def _check_metric(task: DictConfig, labels: Labels) -> None:
    """Raise ConfigErrors for an unknown metric of these labels, or its wrong direction."""
    known = METRICS[labels.problem_type] | {"eval_loss": False}
    if task.metric not in known:
        what = f"{labels.problem_type} has no '{task.metric}'{nearest(task.metric, known)}"
        raise ConfigErrors([Problem("task.metric", what, f"use one of {', '.join(known)}")])
    if task.greater_is_better is not known[task.metric]:
        better = "more" if known[task.metric] else "less"
        fix = f"task.greater_is_better={str(known[task.metric]).lower()}"
        raise ConfigErrors([Problem("task.greater_is_better", f"of {task.metric} {better} is better", fix)])


@dataclass(frozen=True)
class _Encoder:
    """Converts rows to tokens and labels."""

    text: str  # columns
    pair: str | None
    labels: Labels
    tokenizer: PreTrainedTokenizerBase
    limit: int | None  # maximum number of tokens of a row

    def encode(self, rows: Dataset, split: str) -> Any:
        """Return the tokenizer's columns, `labels`, and `cut` (true for rows longer than the limit)."""
        declared = declared_names(rows, self.labels.column)
        key = {
            "task": "classification",
            "tokenizer": tokenizer_digest(self.tokenizer),
            "columns": [self.text, self.pair],
            "labels": asdict(self.labels),
            "declared": declared,
            "max_length": self.limit,
        }

        def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            return self._batch(list(batch_rows(batch, indices, split)), declared)

        return map_cached(rows, convert, features=self._features(), key=key)

    def _batch(self, rows: list[tuple[dict[str, Any], str]], declared: tuple[str, ...]) -> dict[str, list[Any]]:
        columns = (self.text,) if self.pair is None else (self.text, self.pair)
        texts = [[text_in(row, column, place, empty=False) for row, place in rows] for column in columns]
        labels = [self.labels.read(row[self.labels.column], place, declared) for row, place in rows]
        lengths = map(len, self.tokenizer(*texts)["input_ids"])
        inputs = self.tokenizer(*texts, truncation=self.limit is not None, max_length=self.limit)
        cut = [self.limit is not None and length > self.limit for length in lengths]
        return {**{name: inputs[name] for name in self.tokenizer.model_input_names}, "labels": labels, "cut": cut}

    def _features(self) -> Features:
        label = {SINGLE: Value("int64"), MULTI: List(Value("float32"))}.get(self.labels.problem_type, Value("float32"))
        inputs = {name: List(Value("int32")) for name in self.tokenizer.model_input_names}
        return Features({**inputs, "labels": label, "cut": Value("bool")})
