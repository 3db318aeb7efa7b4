"""Answers of a finished run's adapter to texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loraplus_hydra.data.files import load
from loraplus_hydra.data.rows import ORIGIN, columns
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
    has_schema_nulls,
)
from loraplus_hydra.tasks.preference import find_preference_shape, has_preferences
from loraplus_hydra.tasks.rows import text_in
from loraplus_hydra.tasks.tokens import render
from loraplus_hydra.training.gpu_attention import skip_cudnn_attention
from loraplus_hydra.training.sampling import answer, sampling_arguments

Asked = str | Text | Conversation  # a prompt, a text to continue, or the turns before the answer


def predict(
    run: FinishedRun,
    texts: Sequence[Asked],
    pairs: Sequence[str | None] | None = None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Yield an answer for each text, in order.

    For a causal model, an answer is {"prompt", "answer"}: the likeliest tokens, or sampled ones if `temperature` is
    above 0. For a classifier, it is {"text", "label", "scores"}. The label is a list for several labels, and a number
    for a regression. Each name has a score from 0 to 1.
    Raises UserError.
    """
    model, tokenizer = load_run(run)
    model = on_device(model, run)
    if str(run.config.task.task_type) == "SEQ_CLS":
        yield from _classify(model, tokenizer, texts, pairs or [None] * len(texts), run, batch_size)
        return
    chat, sampling = uses_chat(run, tokenizer), sampling_arguments(temperature, top_p)
    for text in texts:
        prompt = _render(text, tokenizer, chat=chat)
        plain = isinstance(text, Text) or (isinstance(text, str) and not chat)
        found = answer(model, tokenizer, prompt, max_new_tokens, special_tokens=plain, **sampling)
        if found is None:
            raise UserError(f"the prompt {_shown(text)!r} has no tokens, so there is nothing to answer")
        yield {"prompt": text.turns if isinstance(text, Conversation) else prompt if plain else text, "answer": found}


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


def _classify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Asked],
    pairs: Sequence[str | None],
    run: FinishedRun,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    names, kind = model.config.id2label, model.config.problem_type
    limit = least(run.config.task.get("max_length"), longest_input(tokenizer, base_of(run)))
    for start in range(0, len(texts), batch_size):
        interrupts.stop_if_asked()
        part, second = list(texts[start : start + batch_size]), list(pairs[start : start + batch_size])
        if not all(isinstance(text, str) for text in part):
            raise UserError("file: a classifier needs texts, not conversations")
        both = [text is not None for text in second]
        if any(both) and not all(both):
            raise UserError("file: only some rows have a second text")
        arguments = (part, second) if any(both) else (part,)
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
        return [_bare(pairs.ask(row, place, chat=chat)) for row, place in zip(rows, places, strict=True)], no_pairs
    shape = _shape(file, rows, column, run)
    # A prompt stays a text, unless other columns are parts of the same conversation.
    chat = chat and bool(CONVERSATION_COLUMNS & {*columns(rows)})
    return [shape.ask(row, place, chat=chat) for row, place in zip(rows, places, strict=True)], no_pairs


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
    nulls = has_schema_nulls(rows, column)
    return Shape(messages=column, schema_nulls=nulls) if listed else Shape(prompt=column, schema_nulls=nulls)


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
