"""A null that a row itself has is kept, and a null for another row's key is not, in each column of each split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Json, List, Value

from loraplus_hydra.data.rows import own_value
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from tests.support.tiny import write_jsonl

Made = Callable[..., Examples]
ASK = {"role": "user", "content": "say 1"}


def row(**arguments: Any) -> dict[str, Any]:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return {"prompt": [ASK], "chosen": [call], "rejected": [{"role": "assistant", "content": "no"}]}


ROWS = [row(x=1), row(y=2)]


def arguments(rows: Any) -> list[Any]:
    return sorted((each["chosen"][0]["tool_calls"][0]["function"]["arguments"] for each in rows), key=str)


@pytest.fixture
def made(compose: Callable[..., Any], llama_folder: Path) -> Made:
    """Return a function from overrides to the examples of `task=dpo`."""

    def make(*overrides: str) -> Examples:
        config = compose("model=hub", f"model.path={llama_folder}", "task=dpo", *overrides)
        return load_examples(config, load_tokenizer(config.model))

    return make


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_calls_of_a_data_set_have_their_own_arguments(made: Made, tmp_path: Path, format: str, streaming: str) -> None:
    rows = [*ROWS, row(z=None)] if format == "jsonl" else ROWS
    for split in ("train", "validation"):
        path = tmp_path / f"{split}.{format}"
        Dataset.from_list(rows).to_parquet(str(path)) if format == "parquet" else write_jsonl(path, rows)
    words = ("data=hub", f"data.name={tmp_path}", "data.eval_split=validation", f"data.streaming={streaming}")
    examples = made(*words)
    expected = [{"x": 1}, {"y": 2}] + ([{"z": None}] if format == "jsonl" else [])
    assert arguments(examples.train) == arguments(examples.eval) == expected


def test_each_split_has_the_nulls_of_its_own_format(made: Made, tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", [row(x=None), row(y=2)])
    table = str(tmp_path / "a.parquet")
    Dataset.from_list(ROWS).to_parquet(table)
    for train, held_out in ((lines, table), (table, lines)):
        examples = made("data=jsonl", "data.format=null", f"data.train={train}", f"data.eval={held_out}")
        found = {str(path): arguments(part) for path, part in ((train, examples.train), (held_out, examples.eval))}
        assert found == {str(lines): [{"x": None}, {"y": 2}], table: [{"x": 1}, {"y": 2}]}


def test_numbers_of_calls_are_unchanged(made: Made, tmp_path: Path) -> None:
    numbers = [{"x": 3.141592653589793}, {"y": 1e-12, "z": 10**30}]
    path = write_jsonl(tmp_path / "a.jsonl", [row(**each) for each in numbers])
    assert arguments(made("data=jsonl", f"data.train={path}", f"data.eval={path}").train) == numbers


def test_columns_of_text_say_nothing_about_the_nulls_of_tools(made: Made, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "default": None}}]
    texts = {"prompt": "say 1", "chosen": "one", "rejected": "two"}
    path = write_jsonl(tmp_path / "a.jsonl", [{**texts, "tools": tools}, {**texts, "tools": json.dumps(tools)}])
    examples = made("data=jsonl", f"data.train={path}", f"data.eval={path}")
    assert [json.loads(each["tools"]) for each in examples.train] == [tools, tools]


def test_a_text_answer_says_nothing_about_the_nulls_of_the_prompt(compose: Callable[..., Any], tmp_path: Path) -> None:
    from tests.support.words import word_tokenizer, written

    turns = [ASK, row(x=None)["chosen"][0], {"role": "tool", "content": "two"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": turns, "completion": "one"}])
    config = compose("data=jsonl", f"data.train={path}", f"data.eval={path}")
    (example,) = load_examples(config, word_tokenizer()).train
    shown = "<user> say 1 <end> <assistant> call f x <unknown> <end> <tool> two <end> <assistant> [one <end>]"
    assert written(example["input_ids"], example["labels"]) == shown


def test_only_objects_with_the_keys_of_all_rows_lose_nulls() -> None:
    feature = List({"a": Value("string"), "b": {"c": Value("int64")}, "d": Json(), "e": List(Value("int64"))})
    value = [{"a": None, "b": {"c": None}, "d": {"f": None}, "e": [None, 1]}]
    assert own_value(value, Features({"v": feature})["v"]) == [{"b": {}, "d": {"f": None}, "e": [None, 1]}]
    assert own_value(value, Json()) == own_value(value, None) == value
