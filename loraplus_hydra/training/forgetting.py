"""The change of the loss on other text: the loss with the adapter minus the base model's loss.

PEFT's benchmark (method_comparison/MetaMathQA) reports such a figure as `forgetting`. The base model is measured before
the adapter is added, so nothing that an adapter changes in it (PiSSA's weights, biases, new rows) can take part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from omegaconf import DictConfig, OmegaConf
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplus_hydra.data.files import load
from loraplus_hydra.data.rows import ORIGIN
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import interrupts, processes
from loraplus_hydra.io.screen import RowProgress
from loraplus_hydra.models.base_model import architecture
from loraplus_hydra.models.properties import positions, trained_positions
from loraplus_hydra.models.tokenizer import new_token_ids
from loraplus_hydra.tasks.base import least
from loraplus_hydra.tasks.conversation import Shape, find_shape
from loraplus_hydra.tasks.template import check_template, set_template
from loraplus_hydra.tasks.tokens import IGNORED, Encoded, LossRule, encode
from loraplus_hydra.training.gpu_attention import skip_cudnn_attention

KEY = "forgetting"
_LONGEST = 1024  # tokens of a piece; a model's logits of a batch take much memory
_AT_ONCE = 2048  # tokens of a batch, with padding
_SHAPES = "use rows with the columns prompt and completion, or messages, or text"


@dataclass(frozen=True)
class Piece:
    """A row's tokens, or a part of a long row. `labels` are IGNORED for tokens whose loss isn't counted."""

    ids: list[int]
    labels: list[int]


def read_pieces(file: str, config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Return the rows of `file` as tokens, for the model of a run's `config`.

    All tokens of a text count, except the first, and of a prompt with an answer those of the answer. Of a conversation
    all tokens count. Rows are cut into pieces of at most 1,024 tokens, or the model's positions. Raises ConfigErrors.
    """
    if str(config.task.task_type) != "CAUSAL_LM":
        raise _error("the run's model doesn't predict text", "leave it out")
    with _errors_of_data():
        rows = load(file, file, unit="paragraph")["train"]
        shape, chat = _shape(file, rows), config.task.get("chat")
        set_template(tokenizer, config.task)
        check_template(tokenizer, shape, chat=chat)
        chat = bool(tokenizer.chat_template) if chat is None else bool(chat)
        parts = [(shape.read(row, row[ORIGIN], chat=chat), row[ORIGIN]) for row in rows]
        encoded = encode(parts, tokenizer, LossRule(completion_only=shape.has_prompt, assistant_only=False), end="")
    _refuse_new_tokens(encoded, [place for _, place in parts], tokenizer, config.model)
    limit = least(_LONGEST, positions(config.model, config.task.auto_class), trained_positions(config.model))
    pieces = [piece for row in encoded for piece in _cut(row, limit or _LONGEST)]
    if not pieces:
        raise _error(f"{file} has no token whose loss could be measured", "use longer texts")
    return pieces


@dataclass
class OtherText:
    """Rows that a run doesn't train on, and the base model's mean loss of a token of them."""

    pieces: Sequence[Piece]
    before: float = math.nan

    def measure_base(self, base: PreTrainedModel, config: DictConfig) -> None:
        """Measure the base model of a run, before its adapter is added."""
        self.before = _base_loss(base, self.pieces, config)

    def change(self, model: Any, config: DictConfig) -> dict[str, float]:
        """Return the metrics: the difference, the loss with the adapter, and the base model's loss."""
        after = mean_loss(model, self.pieces, config)
        return {"forgetting": after - self.before, "forgetting_loss": after, "forgetting_loss_base": self.before}


def _base_loss(base: PreTrainedModel, pieces: Sequence[Piece], config: DictConfig) -> float:
    device = base.device
    if device.type == "cpu" and torch.cuda.is_available() and not config.trainer.get("use_cpu"):
        skip_cudnn_attention()
        base.to(torch.device("cuda", processes.local_rank()))
    # Rows that were added for new tokens are no part of the base, also not of the sum over its vocabulary.
    vocabulary = architecture(config.model).get_text_config().vocab_size
    try:
        return mean_loss(base, pieces, config, vocabulary=vocabulary)
    finally:
        base.to(device)  # so that the adapter's start is drawn as without this measurement


def mean_loss(model: Any, pieces: Sequence[Piece], config: DictConfig, vocabulary: int | None = None) -> float:
    """Return the mean loss of a token in the run's precision. Only the first `vocabulary` logits count."""
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    kind, device = model.device.type, model.device
    half = torch.float16 if config.trainer.get("fp16") else torch.bfloat16
    is_mixed = bool(config.trainer.get("fp16") or config.trainer.get("bf16"))
    with torch.no_grad(), RowProgress(len(pieces) if processes.is_main() else 0) as progress:
        for batch in _batches(pieces):
            interrupts.stop_if_asked()
            width = max(len(piece.ids) for piece in batch)
            ids = torch.tensor([piece.ids + [0] * (width - len(piece.ids)) for piece in batch], device=device)
            mask = torch.tensor([[1] * len(piece.ids) + [0] * (width - len(piece.ids)) for piece in batch])
            with torch.autocast(kind, half, enabled=is_mixed):
                output = model(input_ids=ids, attention_mask=mask.to(device), use_cache=False)
            # The last ones, because an adapter may put tokens of its own before the text
            for piece, logits in zip(batch, output.logits[:, -width:], strict=True):
                labels = torch.tensor(piece.labels[1:], device=device)
                predicted = logits[: len(labels), :vocabulary].float()
                losses = cross_entropy(predicted, labels, ignore_index=IGNORED, reduction="sum")
                total, count = total + losses.item(), count + int((labels != IGNORED).sum())
            progress.advance(len(batch))
    model.train(was_training)
    return total / count


@contextmanager
def _errors_of_data() -> Iterator[None]:
    """Turn errors of the group `data` into errors of `forgetting`."""
    try:
        yield
    except ConfigErrors as error:
        named = [replace(each, key=KEY) if each.key.startswith("data") else each for each in error.problems]
        raise ConfigErrors(named) from None


def _shape(file: str, rows: Dataset) -> Shape:
    try:
        return find_shape(DatasetDict(train=rows, eval=rows), OmegaConf.create())
    except ConfigErrors as error:
        raise ConfigErrors([Problem(KEY, f"{file}: {each.what}", _SHAPES) for each in error.problems]) from None


def _refuse_new_tokens(
    rows: Sequence[Encoded], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, model: DictConfig
) -> None:
    """Raise ConfigErrors if a row has a token that the base model doesn't know."""
    new = set(new_token_ids(tokenizer, model))
    for row, place in zip(rows, places, strict=True):
        if found := new.intersection(row.input_ids):
            token = tokenizer.convert_ids_to_tokens(min(found))
            what = f"{place}: the base model doesn't know '{token}', a new token (model.add_tokens)"
            raise _error(what, "use rows without new tokens")


def _cut(row: Encoded, size: int) -> Iterator[Piece]:
    """Yield the parts of a row that have tokens with loss."""
    for start in range(0, row.length, size):
        piece = Piece(row.input_ids[start : start + size], row.labels[start : start + size])
        if any(label != IGNORED for label in piece.labels[1:]):
            yield piece


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces of similar lengths together."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: len(piece.ids)):
        if batch and (len(batch) + 1) * len(piece.ids) > _AT_ONCE:
            yield batch
            batch = []
        batch.append(piece)
    yield batch


def _error(what: str, fix: str) -> ConfigErrors:
    return ConfigErrors([Problem(KEY, what, fix)])
