"""Training rows as the model will see them, token by token.

The rows come from the data loader of the task's Trainer. The Trainer gets the model without weights, so a preview is
fast for large models, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import open_dict
from rich.text import Text
from transformers import PreTrainedTokenizerBase, set_seed

from loraplus_hydra.check import Checked
from loraplus_hydra.config.targets import locate
from loraplus_hydra.data.rows import is_streamed
from loraplus_hydra.errors import UserError
from loraplus_hydra.io.quiet_libraries import quiet_loading
from loraplus_hydra.io.text import one_line, visible
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.training.hf_trainer.assemble import training_arguments

ROWS = 3
_NO_LOSS = -100
_STYLE = "bold green"


@dataclass(frozen=True)
class Token:
    """A token's text, and whether it has loss."""

    text: str
    carries_loss: bool


@dataclass(frozen=True)
class PreviewedRow:
    """The tokens of a row without padding, and a classifier's label."""

    tokens: tuple[Token, ...]
    label: str | None = None
    side: str = ""  # for a preference: chosen or rejected

    def summary(self) -> str:
        """Return the number of tokens, and the label or the number of tokens with loss."""
        learnt = sum(token.carries_loss for token in self.tokens)
        what = f"label {one_line(self.label)}" if self.label is not None else f"{learnt} have loss"
        return f"{len(self.tokens)} tokens, {what}"


def preview(checked: Checked, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> list[PreviewedRow]:
    """Return the first rows of training, at most ROWS, from the Trainer's collated batches.

    A preference becomes two rows: the prompt with the chosen answer, and the prompt with the rejected answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer_without_weights(checked, tokenizer, examples, Path(folder))
        rows: list[PreviewedRow] = []
        for batch in trainer.get_train_dataloader():
            rows += _rows_of(batch, tokenizer, trainer)
            wanted = 2 * ROWS if rows[0].side else ROWS
            if len(rows) >= wanted:
                break
    return rows[:wanted]


def _trainer_without_weights(
    checked: Checked, tokenizer: PreTrainedTokenizerBase, examples: Examples, folder: Path
) -> Any:
    """Return the task's Trainer with the model on the meta device."""
    quiet_loading()
    config = checked.config.copy()
    with open_dict(config):
        config.trainer.use_cpu = True
        config.trainer.bf16 = config.trainer.fp16 = False
        config.trainer.torch_compile = False
        for name in ("fsdp", "fsdp_config", "deepspeed"):
            config.trainer.pop(name, None)
    trainer_class = locate(config.task._target_)
    # A tensor without data can't be moved to a device, and a preview doesn't need that.
    stay: Callable[..., Any] = lambda trainer, model, device: model  # noqa: E731, ARG005
    unmoved = type(trainer_class.__name__, (trainer_class,), {"_move_model_to_device": stay})
    set_seed(config.seed)  # the same seed as before training, for the same order of rows
    # A model that the Trainer adds, such as a reference, gets no weights either. Streamed rows need real tensors.
    with nullcontext() if is_streamed(examples.train) else torch.device("meta"):
        return unmoved(
            model=checked.model,
            args=training_arguments(config, folder, examples),
            train_dataset=examples.train,
            eval_dataset=examples.eval,
            processing_class=tokenizer,
            **examples.trainer_arguments,
        )


def _rows_of(batch: Any, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> Iterator[PreviewedRow]:
    """Yield the rows of a collated batch; packed rows one by one."""
    ids = batch["input_ids"]
    if "labels" not in batch:
        if "completion_mask" not in batch:
            raise UserError(f"preview: the batches of {type(trainer).__name__} don't show which tokens have loss")
        # TRL's preferences: the chosen answers, then the rejected ones, with the same prompts.
        labels = ids.masked_fill(batch["completion_mask"] == 0, _NO_LOSS)
        if "label" in batch:  # single answers with a label
            for position in range(len(ids)):
                yield from (_row(*part, tokenizer) for part in _documents(batch, labels, position))
            return
        for position in range(len(ids) // 2):
            for side, index in (("chosen", position), ("rejected", position + len(ids) // 2)):
                yield from (_row(*part, tokenizer, side) for part in _documents(batch, labels, index))
        return
    labels = batch["labels"]
    config = trainer.model.config
    for position in range(len(ids)):
        for row_ids, row_labels in _documents(batch, labels if labels.shape == ids.shape else None, position):
            label = (
                None if labels.shape == ids.shape else _label(labels[position], config.id2label, config.problem_type)
            )
            yield replace(_row(row_ids, row_labels, tokenizer), label=label)


def _row(ids: torch.Tensor, labels: torch.Tensor, tokenizer: PreTrainedTokenizerBase, side: str = "") -> PreviewedRow:
    # The first token's label has no effect, because no token before it could predict it.
    learnt = [False, *(labels[1:] != _NO_LOSS).tolist()]
    tokens = (Token(_shown(tokenizer, token), loss) for token, loss in zip(ids.tolist(), learnt, strict=True))
    return PreviewedRow(tuple(tokens), side=side)


def _documents(
    batch: Any, all_labels: torch.Tensor | None, position: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels) of each document in a batch's row, without padding."""
    ids = batch["input_ids"][position]
    labels = torch.full_like(ids, _NO_LOSS) if all_labels is None else all_labels[position]
    if "attention_mask" in batch:
        kept = batch["attention_mask"][position].bool()
        yield ids[kept], labels[kept]
        return
    starts = (batch["position_ids"][position] == 0).nonzero().flatten().tolist()
    sizes = torch.tensor([*starts, len(ids)]).diff().tolist()
    yield from zip(ids.split(sizes), labels.split(sizes), strict=True)


def _label(label: torch.Tensor, names: dict[int, str], problem_type: str | None) -> str:
    if problem_type == "regression":
        return f"{label.item():g}"
    if problem_type == "multi_label_classification":
        return ", ".join(names[index] for index in label.nonzero().flatten().tolist()) or "(none)"
    return f"{names[int(label)]} ({int(label)})"


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text on one line. A part of a character is shown as in the vocabulary."""
    text = str(tokenizer.decode([token]))
    spelt = str(tokenizer.convert_ids_to_tokens(token))
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        text = spelt
    # Only the vocabulary shows the space before a word's first token.
    if spelt.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
        text = " " + text
    return text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def render(row: PreviewedRow, *, coloured: bool) -> Text:
    """Return a row as text. Tokens with loss are coloured, or in brackets."""
    shown = Text()
    for index, token in enumerate(row.tokens):
        if index:
            shown.append("|", style="dim")
        text = token.text if coloured or not token.carries_loss else f"[{token.text}]"
        shown.append(visible(text), style=_STYLE if token.carries_loss else "")
    return shown
