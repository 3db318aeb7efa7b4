"""Classification of texts or of pairs of texts: one label, several, or a measured number -> what a Trainer takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplus_hydra.data.cache import map_cached, tokenizer_digest
from loraplus_hydra.data.rows import SPLITS, is_streamed
from loraplus_hydra.errors import ConfigErrors, Problem, nearest
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.tasks.labels import Labels, find_labels
from loraplus_hydra.tasks.metrics import METRICS, MULTI, SINGLE, metrics_of
from loraplus_hydra.tasks.rows import batch_rows, require_columns, text_in

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features
    from omegaconf import DictConfig
    from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 1_000_000  # tokenizers that know no limit state a far larger number


def examples(
    rows: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: DictConfig,
    data: DictConfig,
    *,
    problem_type: str | None = None,
    max_length: int | None = None,
) -> Examples:
    """Rows with the columns `data.text_column`, `data.text_pair_column` (unless null) and `data.label_column`.

    `model_arguments` of the result size and name the model's head. Raises ConfigErrors.
    """
    wanted = {f"data.{key}": data[key] for key in ("text_column", "label_column") if key in data}
    if missing := [key for key in ("text_column", "label_column") if key not in data]:
        what = f"this option of `data` doesn't say what the column is called ({data._target_})"
        raise ConfigErrors([Problem(f"data.{key}", what, f"name it: +data.{key}=...") for key in missing])
    pair = data.get("text_pair_column")
    require_columns(rows, wanted | ({"data.text_pair_column": pair} if pair else {}))
    if any(is_streamed(rows[split]) for split in SPLITS):
        what = "the labels of streamed rows can't be known before they are read"
        raise ConfigErrors([Problem("data.streaming", what, "set it to false")])
    pair = None if pair is None or _is_null(rows["train"], pair) else pair
    labels = find_labels(rows, data.label_column, problem_type, sampled=data.get("max_samples") is not None)
    _check_metric(task, labels)
    limit = _limit(tokenizer, max_length)
    key = {
        "task": "classification",
        "tokenizer": tokenizer_digest(tokenizer),
        "columns": [data.text_column, pair],
        "labels": vars(labels) | {"_numbers": None},
        "max_length": limit,
    }
    encoded: dict[str, Dataset] = {}
    notes = []
    for split in SPLITS:
        convert = _converter(data.text_column, pair, labels, tokenizer, limit, split)
        found: Any = map_cached(
            rows[split], convert, columns=rows[split].column_names, features=_features(labels, tokenizer), key=key
        )
        if cut := sum(found["cut"]):
            notes.append(
                f"{cut:,} of {len(found):,} {split} rows are longer than {limit} tokens: their ends are cut off."
            )
        encoded[split] = found.remove_columns("cut")
    from transformers import DataCollatorWithPadding

    return Examples(
        train=encoded["train"],
        eval=encoded["eval"],
        trainer_arguments={
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": metrics_of(labels.problem_type),
        },
        # A causal model judges by the last token of a text, which it finds by the pad token's id.
        model_arguments=labels.model_arguments() | {"pad_token_id": tokenizer.pad_token_id},
        notes=tuple(notes),
    )


def _is_null(rows: Dataset, column: str) -> bool:
    """Whether a column is there for form's sake, of a type without values."""
    return getattr(rows.features[column], "dtype", None) == "null"


def _check_metric(task: DictConfig, labels: Labels) -> None:
    """The metric that a sweep goes by must be one that this kind of labels has, and point the right way."""
    known = METRICS[labels.problem_type] | {"eval_loss": False}
    if task.metric not in known:
        what = f"{labels.problem_type} has no '{task.metric}'{nearest(task.metric, known)}"
        raise ConfigErrors([Problem("task.metric", what, f"one of: {', '.join(known)}")])
    if task.greater_is_better is not known[task.metric]:
        better = "more" if known[task.metric] else "less"
        fix = f"task.greater_is_better={str(known[task.metric]).lower()}"
        raise ConfigErrors([Problem("task.greater_is_better", f"of {task.metric} {better} is better", fix)])


def _limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """Tokens at most: as asked for, but no more than the model has positions for."""
    own = tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None
    limits = [limit for limit in (max_length, own) if limit is not None]
    return min(limits) if limits else None


def _features(labels: Labels, tokenizer: PreTrainedTokenizerBase) -> Features:
    from datasets import Features, List, Value

    label = {SINGLE: Value("int64"), MULTI: List(Value("float32"))}.get(labels.problem_type, Value("float32"))
    inputs = {name: List(Value("int32")) for name in tokenizer.model_input_names}
    return Features({**inputs, "labels": label, "cut": Value("bool")})


def _converter(
    text: str, pair: str | None, labels: Labels, tokenizer: PreTrainedTokenizerBase, limit: int | None, split: str
) -> Any:
    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        placed = list(batch_rows(batch, indices, split))
        texts = [text_in(row, text, place, empty=False) for row, place in placed]
        pairs = None if pair is None else [text_in(row, pair, place, empty=False) for row, place in placed]
        targets = [labels.read(row[labels.column], place) for row, place in placed]
        whole = tokenizer(texts, pairs)["input_ids"]
        cut = [limit is not None and len(ids) > limit for ids in whole]
        inputs = tokenizer(texts, pairs, truncation=limit is not None, max_length=limit)
        return {**{name: inputs[name] for name in tokenizer.model_input_names}, "labels": targets, "cut": cut}

    return convert
