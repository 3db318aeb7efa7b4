"""Answers of a finished run's adapter to texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraplus_hydra.data.files import load
from loraplus_hydra.data.rows import columns
from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.models.quantization import is_quantized
from loraplus_hydra.runs.finished import FinishedRun, load_run
from loraplus_hydra.tasks.chat import apply_template
from loraplus_hydra.training.sampling import answer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

Text = str | list[dict[str, Any]]  # or the messages of a conversation


def predict(
    run: FinishedRun,
    texts: Sequence[Text],
    pairs: Sequence[str | None] | None = None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> Iterator[dict[str, Any]]:
    """Yield an answer for each text, in order.

    For a causal model {"prompt", "answer"}, greedy; for a classifier {"text", "label", "scores"}: a label (for several
    labels a list, for a regression the number) and a score from 0 to 1 for each name. Raises UserError.
    """
    model, tokenizer = load_run(run)
    model = _on_device(model, run)
    if str(run.config.task.task_type) == "SEQ_CLS":
        yield from _classify(model, tokenizer, texts, pairs or [None] * len(texts), run, batch_size)
        return
    for text in texts:
        prompt, plain = _rendered(text, tokenizer, run)
        found = answer(model, tokenizer, prompt, max_new_tokens, special_tokens=plain)
        yield {"prompt": text, "answer": found}


def _rendered(text: Text, tokenizer: PreTrainedTokenizerBase, run: FinishedRun) -> tuple[str, bool]:
    """Return the prompt as in training, and True if the tokenizer is to add its own tokens."""
    chat = run.config.task.get("chat", False)  # a task without this key knows no turns
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if isinstance(text, str) and not chat:
        return text, True
    if not tokenizer.chat_template:
        raise UserError("file: it holds conversations, but the run's tokenizer has no chat template")
    turns = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return str(apply_template(tokenizer, turns, add_generation_prompt=True, tokenize=False)), False


def _classify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    pairs: Sequence[str | None],
    run: FinishedRun,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    names, kind = model.config.id2label, model.config.problem_type
    for start in range(0, len(texts), batch_size):
        part, second = list(texts[start : start + batch_size]), list(pairs[start : start + batch_size])
        if not all(isinstance(text, str) for text in part):
            raise UserError("file: a classifier takes texts, not conversations")
        both = [text is not None for text in second]
        if any(both) and not all(both):
            raise UserError("file: some rows have a second text and others have none")
        arguments = (part, second) if any(both) else (part,)
        limit = run.config.task.get("max_length")
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


def read_texts(file: str, column: str | None, run: FinishedRun) -> tuple[list[Text], list[str | None]]:
    """Return the texts of a file and a classifier's second texts. Raises ConfigErrors."""
    try:
        rows = load(file, file, unit="line")["train"]
    except ConfigErrors as error:
        mended = [Problem("file", problem.what, problem.fix.replace("data.", "")) for problem in error.problems]
        raise ConfigErrors(mended) from None
    data, there = run.config.data, columns(rows)
    if column is None and Path(file).suffix in (".txt", ".text", ".md"):
        column = "text"
    named = [data.get(f"{kind}_column") for kind in ("prompt", "messages", "text")]
    name = column or next((one for one in named if one in there), None)
    if name not in there:
        looked = column or ", ".join(str(one) for one in named if one is not None)
        raise ConfigErrors(
            [Problem("column", f"{file} has no column {looked}", f"the columns are: {', '.join(there)}")]
        )
    texts = list(rows[name])
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, (str, list)) or not text:
            what = f"row {number} of {file}: '{name}' is no text"
            raise ConfigErrors([Problem("file", what, "mend the row, or leave it out")])
    pair = data.get("text_pair_column")
    return texts, list(rows[pair]) if pair in there else [None] * len(texts)


def _on_device(model: PeftModel, run: FinishedRun) -> Any:
    """Return the model on the accelerator, unless the run avoids it or the quantised base is there."""
    if run.config.trainer.get("use_cpu") or is_quantized(run.config.quantization) or not torch.cuda.is_available():
        return model
    return model.to("cuda")
