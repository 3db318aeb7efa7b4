"""Errors in data: `check` gives one message with the place, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.support.tiny import TEMPLATE, chat_tokenizer, save_llama

GOOD = {"prompt": "say 1", "completion": "the number 1"}
TURNS = [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "the number 1"}]
LABELLED = [{"text": "the card has arrived", "label": "there"}, {"text": "a payment failed", "label": "failed"}]


@dataclass(frozen=True)
class Mistake:
    """A wrong file, the overrides, and the expected messages.

    `{path}` stands for the file.
    """

    expected: tuple[str, ...]
    rows: tuple[Any, ...] | None = None  # of a JSONL file
    content: bytes | None = None  # of any other
    name: str = "rows.jsonl"
    overrides: tuple[str, ...] = ()
    task: str = "sft"
    model: str = "llama"
    held_out: tuple[Any, ...] = field(default=())  # rows of the file to evaluate on; by default the file itself


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def sft(*rows: Any, expected: tuple[str, ...], **more: Any) -> Mistake:
    return Mistake(expected, rows=rows, **more)


def classification(*rows: Any, expected: tuple[str, ...], **more: Any) -> Mistake:
    return Mistake(expected, rows=rows, task="classification", model="bert", **more)


def csv(content: bytes, *expected: str, overrides: tuple[str, ...] = ()) -> Mistake:
    return Mistake(expected, content=content, name="rows.csv", overrides=overrides, task="classification", model="bert")


MISTAKES: dict[str, Mistake] = {
    # The file
    "file not there": Mistake(
        ("data.train", "rowz.jsonl: No such file (did you mean 'rows.jsonl'?); it was searched for in "),
        rows=(GOOD,),
        overrides=("data.train={folder}/rowz.jsonl",),
    ),
    "folder for a file": Mistake(
        ("data.train", "is a folder", "*.jsonl"), rows=(GOOD,), overrides=("data.train={folder}",)
    ),
    "pattern without a match": Mistake(
        ("data.train", "no file matches", "it was searched for in ", "give the path of"),
        rows=(GOOD,),
        overrides=("data.train={folder}/*.json",),
    ),
    "no rows": Mistake(("data.train", "rows.jsonl has no rows"), content=b"\n\n"),
    "one row and none to hold out": sft(
        GOOD, expected=("has only one row, so none can be held out", "data.eval"), overrides=("data.eval=null",)
    ),
    "broken JSON": Mistake(("rows.jsonl, line 3: not JSON", "column"), content=jsonl(GOOD) + b"\n{'prompt': 1}\n"),
    "JSON that is no object": Mistake(("line 2: a list", "one object per line"), content=jsonl(GOOD, [GOOD])),
    "half a character": Mistake(
        ("line 1: half of a surrogate pair",), content=b'{"prompt": "\\ud800", "completion": "a"}\n'
    ),
    "wrong encoding": Mistake(
        ("rows.jsonl, line 2: not utf-8 text", "data.encoding=latin-1"),
        content=jsonl(GOOD) + '{"prompt": "caf\u00e9", "completion": "a"}\n'.encode("latin-1"),
    ),
    "unknown encoding": sft(
        GOOD, expected=("data.encoding", "no encoding 'utf-9'"), overrides=("data.encoding=utf-9",)
    ),
    "parquet that isn't": Mistake(
        ("rows.parquet: can't be read as a Parquet file",),
        content=jsonl(GOOD),
        name="rows.parquet",
        overrides=("data.format=null",),
    ),
    "suffix that says nothing": Mistake(
        ("no format has the suffix '.dat'", "data.format is one of"),
        content=jsonl(GOOD),
        name="rows.dat",
        overrides=("data.format=null",),
    ),
    "weight that is none": sft(
        GOOD, expected=("data.train", "weight", "finite number above 0"), overrides=("data.train={{{path}: -1}}",)
    ),
    "more cells than columns": csv(b"text,label\na,b\na,b,c\n", "rows.csv, line 3: there are 3 cells, but 2 columns"),
    "fewer cells than columns": csv(b"text,label\na\n", "rows.csv, line 2: there are 1 cells, but 2 columns"),
    "column that exists twice": csv(b"text,label,text\na,b,c\n", "there are two columns 'text'"),
    "quote that never ends": csv(b'text,label\na,b\n"a,b\n', "rows.csv, line 3", "unexpected end of data"),
    "header alone": csv(b"text,label\n", "rows.csv has no rows"),
    "delimiter of two characters": csv(b"text;label\n", "data.delimiter", "not one", overrides=("+data.delimiter=ab",)),
    # The columns
    "no known column": sft({"q": "a", "a": "b"}, expected=("none of the expected columns", "columns are q, a")),
    "missing column": sft(
        {"prompt": "a", "answer": "b"}, expected=("data.completion_column", "no column 'completion'", "prompt, answer")
    ),
    "misspelt column": sft(
        {"question": "a", "answer": "b"},
        overrides=("data.prompt_column=qestion", "data.completion_column=answer"),
        expected=("data.prompt_column", "no column 'qestion' (did you mean 'question'?)", "question, answer"),
    ),
    "column missing from the held-out rows": sft(
        GOOD, held_out=({"prompt": "a", "answer": "b"},), expected=("the eval rows have no column 'completion'",)
    ),
    "two shapes at once": sft(
        {**GOOD, "messages": TURNS}, expected=("can be read as prompt and completion or as messages",)
    ),
    "no label column": classification(
        {"text": "a", "intent": "b"}, expected=("data.label_column", "no column 'label'", "text, intent")
    ),
    # The values
    "null": sft(
        GOOD, {"prompt": "a", "completion": None}, expected=("rows.jsonl, line 2: 'completion' is null, not text",)
    ),
    "key that a row lacks": sft(GOOD, {"prompt": "a"}, expected=("line 2: 'completion' is null",)),
    "number for text": sft(
        GOOD, {"prompt": 7, "completion": "b"}, expected=("line 2: 'prompt' is the number 7, not text",)
    ),
    "functions that are no list": sft(
        {"messages": TURNS, "functions": 5}, expected=("'functions' is the number 5, not a list of functions",)
    ),
    "argument of the template that the program sets": sft(
        {"messages": TURNS, "chat_template_kwargs": {"tokenize": False}},
        expected=("'chat_template_kwargs' has the key 'tokenize', which this program sets",),
    ),
    "messages as a text of deep JSON": sft(
        {"messages": TURNS, "tools": "[" * 100_000}, expected=("'tools' is not JSON",)
    ),
    "object for text": sft(
        GOOD,
        {"prompt": {"a": 1}, "completion": "b"},
        expected=("line 2, message 1: 'prompt' has a message without a role",),
    ),
    "empty completion": sft(GOOD, {"prompt": "a", "completion": " "}, expected=("line 2: 'completion' is empty",)),
    "text for messages": sft(
        {"messages": TURNS}, {"messages": "hello"}, expected=("line 2: 'messages' is the text 'hello'",)
    ),
    "no messages": sft({"messages": TURNS}, {"messages": []}, expected=("line 2: 'messages' is an empty list",)),
    "message that is text": sft(
        {"messages": ["hello"]}, expected=("line 1, message 1: 'messages' has the text 'hello'",)
    ),
    "unknown role": sft(
        {"messages": [TURNS[0], {"role": "asistant", "content": "b"}]},
        expected=("line 1, message 2", "role 'asistant' (did you mean 'assistant'?)"),
    ),
    "message without a role": sft({"messages": [{"content": "b"}]}, expected=("line 1, message 1", "without a role")),
    "message without content": sft({"messages": [{"role": "user"}]}, expected=("line 1, message 1", "without content")),
    "empty answer": sft(
        {"messages": [TURNS[0], {"role": "assistant", "content": ""}]},
        expected=("message 2", "an empty message of the assistant"),
    ),
    "template that fails": sft(
        {"messages": TURNS},
        {"messages": TURNS[1:]},
        model="strict",
        expected=("line 2: the chat template fails: user first!",),
    ),
    "tokenizer without a template": sft(
        {"messages": TURNS}, model="plain", expected=("model.tokenizer", "no chat template", "chat_template_path")
    ),
    "template asked for and not there": sft(
        GOOD, model="plain", overrides=("task.chat=true",), expected=("model.tokenizer", "task.chat is true")
    ),
    "no assistant to learn from": sft(
        {"messages": TURNS},
        {"messages": TURNS[:1]},
        overrides=("task.args.assistant_only_loss=true",),
        expected=("line 2: the template marks no token as the assistant's",),
    ),
    "assistant's loss on plain text": sft(
        {"text": "a"},
        overrides=("task.args.assistant_only_loss=true",),
        expected=("task.args.assistant_only_loss", "no turns"),
    ),
    "completion's loss on plain text": sft(
        {"text": "a"},
        overrides=("task.args.completion_only_loss=true",),
        expected=("completion_only_loss", "no completion"),
    ),
    "rows that are all too long": sft(
        GOOD, overrides=("task.args.max_length=2",), expected=("task.args.max_length", "has a token to learn")
    ),
    "setting of another task": sft(GOOD, overrides=("task.block_size=8",), expected=("task.block_size", "task=text")),
    "empty text": classification(*LABELLED, {"text": "", "label": "there"}, expected=("line 3: 'text' is empty",)),
    "label that is null": classification(
        *LABELLED, {"text": "a", "label": None}, expected=("line 3: 'label' is null",)
    ),
    "label that is empty": csv(b"text,label\na,b\nc,\n", "rows.csv, line 3: 'label' is empty"),
    "label of the held-out rows alone": classification(
        *LABELLED,
        held_out=({"text": "a", "label": "faild"},),
        expected=(
            "held_out.jsonl, line 1",
            "'faild', a label that no training row has (did you mean 'failed'?)",
            "failed, there",
        ),
    ),
    "one label alone": classification(
        {"text": "a", "label": "x"},
        {"text": "b", "label": "x"},
        expected=("only one label, 'x'", "two or more labels"),
    ),
    "label that is no number": classification(
        {"text": "a", "label": 1.5},
        {"text": "a", "label": "high"},
        overrides=("task.problem_type=regression", "task.metric=eval_pearson"),
        expected=("line 2: 'label' is the text 'high', but a regression needs a number",),
    ),
    "number that is not finite": csv(
        b"text,label\na,nan\n",
        "line 2: 'label' is nan, not a finite number",
        overrides=("task.problem_type=regression", "task.metric=eval_pearson"),
    ),
    "label that is no list": classification(
        {"text": "a", "label": ["x", "y"]},
        {"text": "a", "label": "x"},
        overrides=("task.problem_type=multi_label_classification",),
        expected=("line 2: 'label' is the text 'x', not a list of labels",),
    ),
    "fraction for a label": classification(
        *LABELLED,
        {"text": "a", "label": 0.5},
        overrides=("task.problem_type=single_label_classification",),
        expected=("line 3: 'label' is the number 0.5", "task.problem_type=regression"),
    ),
    "problem type that isn't one": classification(
        *LABELLED,
        overrides=("task.problem_type=multilabel",),
        expected=("task.problem_type", "multi_label_classification"),
    ),
    "streamed labels": classification(
        *LABELLED, overrides=("data.streaming=true",), expected=("data.streaming", "labels")
    ),
    "streamed rows without a last step": sft(
        GOOD,
        overrides=("data.streaming=true", "trainer.max_steps=-1"),
        expected=("trainer.max_steps", "number of streamed rows is unknown"),
    ),
    "text of no words": Mistake(
        ("rows have no text to continue",), content=jsonl({"text": ""}), task="text", overrides=("task.block_size=8",)
    ),
}


@pytest.fixture(scope="module")
def strict_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model whose template raises an error unless a user begins."""
    strict = "{%- if messages[0]['role'] != 'user' -%}{{ raise_exception('user first!') }}{%- endif -%}" + TEMPLATE
    return save_llama(tmp_path_factory.mktemp("strict"), chat_tokenizer(strict))


@pytest.fixture
def folders(llama_folder: Path, plain_llama_folder: Path, strict_folder: Path, bert_folder: Path) -> dict[str, Path]:
    return {"llama": llama_folder, "plain": plain_llama_folder, "strict": strict_folder, "bert": bert_folder}


@pytest.mark.parametrize("name", MISTAKES)
def test_error_has_its_place(
    name: str,
    cli: Callable[..., Finished],
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    mistake = MISTAKES[name]
    folder = tmp_path_factory.mktemp("wrong")
    path = folder / mistake.name
    path.write_bytes(jsonl(*mistake.rows) if mistake.rows is not None else mistake.content or b"")
    held_out = path
    if mistake.held_out:
        held_out = folder / "held_out.jsonl"
        held_out.write_bytes(jsonl(*mistake.held_out))
    finished = cli(
        "check",
        f"task={mistake.task}",
        "model=hub",
        f"model.path={folders[mistake.model]}",
        f"data={'csv' if path.suffix == '.csv' else 'jsonl'}",
        f"data.train={path}",
        f"data.eval={held_out}",
        "trainer.max_steps=2",
        *(override.format(folder=folder, path=path) for override in mistake.overrides),
    )
    assert finished.status == 1
    assert "1 error:" in finished.err
    for words in mistake.expected:
        assert words in finished.err
    assert "Traceback" not in finished.out + finished.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_wrong_data_leaves_no_folder(
    cli: Callable[..., Finished], llama_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    path = tmp_path_factory.mktemp("wrong") / "rows.jsonl"
    path.write_bytes(jsonl(GOOD, {"prompt": "a", "completion": None}))
    finished = cli("model=hub", f"model.path={llama_folder}", "data=jsonl", f"data.train={path}", f"data.eval={path}")
    assert finished.status == 1
    assert "line 2" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_check_counts_the_rows_to_be_cut(
    cli: Callable[..., Finished], llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("long") / "rows.jsonl"
    path.write_bytes(jsonl(GOOD, {"prompt": "a", "completion": "1 " * 50}))
    rows = (f"data.train={path}", f"data.eval={path}")
    finished = cli("check", "model=hub", f"model.path={llama_folder}", "data=jsonl", *rows, "task.args.max_length=20")
    assert finished.status == 0
    assert "1 of 2 train rows are longer than 20 tokens: their ends are cut off" in finished.out
