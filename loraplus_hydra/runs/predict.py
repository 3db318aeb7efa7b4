"""Answers of a finished run's adapter to texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.files import load
from loraplus_hydra.data.rows import ORIGIN, columns, own_rows
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.models.quantization import is_quantized
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.load_finished import base_of, load_run, load_run_tokenizer
from loraplus_hydra.tasks.base import least, longest_input
from loraplus_hydra.tasks.conversation import (
    CONVERSATION_COLUMNS,
    Conversation,
    Shape,
    Text,
    find_shape,
)
from loraplus_hydra.tasks.preference import find_preference_shape, has_preferences
from loraplus_hydra.tasks.rows import text_in
from loraplus_hydra.tasks.tokens import encode_prompt, pad_as_class, render
from loraplus_hydra.training.gpu_attention import skip_cudnn_attention
from loraplus_hydra.training.sampling import (
    Stopped,
    answer_together,
    is_float32,
    padding_problem,
    sampling_arguments,
)

_CLASSIFIED, _ANSWERED = 32, 8  # texts in a batch
Asked = str | Text | Conversation  # a prompt, a text to continue, or the turns before the answer


def predict(
    run: FinishedRun,
    texts: Sequence[Asked],
    pairs: Sequence[str | None] | None = None,
    *,
    max_new_tokens: int = 128,
    batch_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Load the run's model, and return an iterator over an answer for each text, in order.

    For a causal model, an answer is {"prompt", "answer"}: the likeliest tokens, or sampled ones if `temperature` is
    above 0. For a classifier, it is {"text", "label", "scores"}. The label is a list for several labels, and a number
    for a regression. Each name has a score from 0 to 1. `batch_size` texts are computed together; without it, 32 for a
    classifier, and for a causal model 8 in float32, where the answers don't depend on it, otherwise 1. Raises
    UserError.
    """
    if str(run.config.task.task_type) == "SEQ_CLS":
        pairs = pairs or [None] * len(texts)
        _refuse_unlike(texts, pairs)
        model, tokenizer = load_run(run)
        return _classify(on_device(model, run), tokenizer, texts, pairs, run, batch_size or _CLASSIFIED)
    tokenizer = load_run_tokenizer(run)
    prompts = [_prompt(text, tokenizer, chat=uses_chat(run, tokenizer)) for text in texts]
    model, _ = load_run(run)
    size = _batch_size(model, batch_size, most=len(texts))
    sampling = sampling_arguments(temperature, top_p)
    return _answers(on_device(model, run), tokenizer, prompts, max_new_tokens, size, sampling)


@dataclass(frozen=True)
class _Prompt:
    """A text to answer: its tokens, and the prompt as the answer repeats it."""

    shown: Any
    ids: list[int]


def _prompt(text: Asked, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> _Prompt:
    """Return a text's tokens in the form of the training prompts. Raises UserError if it has none."""
    prompt = _render(text, tokenizer, chat=chat)
    plain = isinstance(text, Text) or (isinstance(text, str) and not chat)
    ids = encode_prompt(prompt, tokenizer, special_tokens=plain)
    if not ids:
        raise UserError(f"the prompt {_shown(text)!r} has no tokens, so there is nothing to answer")
    return _Prompt(text.turns if isinstance(text, Conversation) else prompt if plain else text, ids)


def _batch_size(model: PeftModel, wanted: int | None, *, most: int) -> int:
    """Return the number of prompts that are answered together."""
    if wanted == 1 or most == 1 or (wanted is None and not is_float32(model)):
        return 1
    if why := padding_problem(model):
        if wanted is not None:
            print(f"Note: batch_size: the texts are answered one at a time, because {why}", file=sys.stderr)
        return 1
    return wanted or _ANSWERED


def _answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[_Prompt],
    max_new_tokens: int,
    batch_size: int,
    sampling: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(prompts), batch_size):
        interrupts.stop_if_asked()
        part = prompts[start : start + batch_size]
        ids = [prompt.ids for prompt in part]
        texts = answer_together(model, tokenizer, ids, max_new_tokens, stopping_criteria=[Stopped()], **sampling)
        interrupts.stop_if_asked()  # these answers end at the signal
        for prompt, text in zip(part, texts, strict=True):
            yield {"prompt": prompt.shown, "answer": text}


def _render(text: Asked, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """Return the prompt in the form of the training prompts."""
    if isinstance(text, Text):
        return text.completion
    if isinstance(text, str) and not chat:
        return text
    if not tokenizer.chat_template:
        raise UserError("file: it has conversations, but the run's tokenizer has no chat template")
    conversation = Conversation([{"role": "user", "content": text}]) if isinstance(text, str) else text
    return render(conversation.turns, conversation.template_arguments, tokenizer)


def _shown(asked: Asked) -> str:
    text = asked.turns if isinstance(asked, Conversation) else asked.completion if isinstance(asked, Text) else asked
    return str(text)[:100]


def uses_chat(run: FinishedRun, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if training turned plain prompts into turns."""
    chat = run.config.task.get("chat", False)  # a task without this key has no turns
    return bool(tokenizer.chat_template) if chat is None else bool(chat)


def _refuse_unlike(texts: Sequence[Asked], pairs: Sequence[str | None]) -> None:
    """Raise UserError if a classifier can't read the texts, or only some have a second text."""
    if not all(isinstance(text, str) for text in texts):
        raise UserError("file: a classifier needs texts, not conversations")
    if len({text is None for text in pairs}) > 1:
        raise UserError("file: only some rows have a second text")


def _classify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Asked],
    pairs: Sequence[str | None],
    run: FinishedRun,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    pad_as_class(tokenizer)
    names, kind = model.config.id2label, model.config.problem_type
    limit = least(run.config.task.get("max_length"), longest_input(tokenizer, base_of(run)))
    for start in range(0, len(texts), batch_size):
        interrupts.stop_if_asked()
        part, second = list(texts[start : start + batch_size]), list(pairs[start : start + batch_size])
        arguments = (part,) if second[0] is None else (part, second)
        inputs = tokenizer(*arguments, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs.to(model.device)).logits.float().cpu()
        for text, other, row in zip(part, second, logits, strict=True):
            given = {"text": text} if other is None else {"text": text, "text_pair": other}
            yield given | _judged(row, names, kind)


def _judged(logits: Any, names: dict[int, str], kind: str | None) -> dict[str, Any]:
    if kind == "regression" or len(logits) == 1:
        return {"label": logits[0].item()}
    several = kind == "multi_label_classification"
    scores = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
    named = {names[number]: score for number, score in enumerate(scores)}
    label = [name for name, score in named.items() if score > 0.5] if several else names[int(logits.argmax())]
    return {"label": label, "scores": named}


def read_texts(file: str, column: str | None, run: FinishedRun) -> tuple[list[Asked], list[str | None]]:
    """Return the prompts in a file's rows, and a classifier's second texts. Raises ConfigErrors."""
    try:
        return _read(file, column, run)
    except ConfigErrors as error:
        named = [replace(each, key="file" if each.key.startswith("data") else each.key) for each in error.problems]
        raise ConfigErrors([replace(each, fix=each.fix.replace("data.", "")) for each in named]) from None


def _read(file: str, column: str | None, run: FinishedRun) -> tuple[list[Asked], list[str | None]]:
    rows = load(file, file, unit="line")["train"]
    if column is None and Path(file).suffix in (".txt", ".text", ".md"):
        column = "text"
    if str(run.config.task.task_type) == "SEQ_CLS":
        return _texts(file, rows, column or run.config.data.get("text_column", "text"), run)
    both, places = DatasetDict(train=rows, eval=rows), rows[ORIGIN]
    no_pairs: list[str | None] = [None] * len(rows)
    chat = uses_chat(run, load_run_tokenizer(run))
    if column is None and has_preferences(both, run.config.data):
        pairs = find_preference_shape(both, run.config.data)
        return [
            _bare(pairs.ask(row, place, chat=chat)) for row, place in zip(own_rows(rows), places, strict=True)
        ], no_pairs
    shape = _shape(file, rows, column, run)
    # A prompt stays a text, unless other columns are parts of the same conversation.
    chat = chat and bool(CONVERSATION_COLUMNS & {*columns(rows)})
    return [shape.ask(row, place, chat=chat) for row, place in zip(own_rows(rows), places, strict=True)], no_pairs


def _bare(asked: Asked) -> Asked:
    """Return a conversation of one text as plain text, like the value of `text=`."""
    if isinstance(asked, Conversation) and not asked.template_arguments and len(asked.turns) == 1:
        (turn,) = asked.turns
        if turn == {"role": "user", "content": turn.get("content")}:
            return str(turn["content"])
    return asked


def _texts(file: str, rows: Dataset, column: str, run: FinishedRun) -> tuple[list[Asked], list[str | None]]:
    """Return the rows' texts, and their second texts."""
    if column not in columns(rows):
        raise _no_column(file, rows, column)
    pair = run.config.data.get("text_pair_column")
    texts: list[Asked] = [text_in(row, column, row[ORIGIN], empty=False) for row in rows]
    return texts, list(rows[pair]) if pair in columns(rows) else [None] * len(rows)


def _shape(file: str, rows: Dataset, column: str | None, run: FinishedRun) -> Shape:
    """Return the columns with the prompt: `column`, or the columns that training would read."""
    if column is None:
        try:
            return find_shape(DatasetDict(train=rows, eval=rows), run.config.data, prompts_only=True)
        except ConfigErrors as error:
            raise _no_column(file, rows, "prompt, messages, text") from error
    if column not in columns(rows):
        raise _no_column(file, rows, column)
    listed = any(isinstance(value, list) for value in rows[column])
    return Shape(messages=column) if listed else Shape(prompt=column)


def _no_column(file: str, rows: Dataset, name: str) -> ConfigErrors:
    what = f"{file} has no column {name}"
    return ConfigErrors([Problem("column", what, f"the columns are {', '.join(columns(rows))}")])


def on_device(model: PeftModel, run: FinishedRun) -> Any:
    """Return the model on the accelerator.

    It is not moved if the run uses the CPU, or if a quantised base is already on a device.
    """
    if run.config.trainer.get("use_cpu") or is_quantized(run.config.quantization) or not torch.cuda.is_available():
        return model
    skip_cudnn_attention()  # an answer has a new length with each token
    return model.to("cuda")
