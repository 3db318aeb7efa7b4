"""Streamed rows that differ in their columns: every row keeps its own columns, whatever the order of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import AutoTokenizer

from loraplus_hydra.data.rows import columns, first_columns, with_columns
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from tests.support.tiny import END, write_jsonl

Made = Callable[..., Examples]
SEEDS = range(4)
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture
def made(compose: Callable[..., Any], tmp_path: Path, llama_folder: Path) -> Made:
    """Return a function from training rows, in one file or several, to the task's examples."""

    def make(*files: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None, words: Any = ()) -> Examples:
        paths = [write_jsonl(tmp_path / f"{number}.jsonl", rows) for number, rows in enumerate(files)]
        evaluated = write_jsonl(tmp_path / "eval.jsonl", held_out or files[0])
        train = f"data.train=[{','.join(map(str, paths))}]"
        overrides = ("model=hub", f"model.path={llama_folder}", "data=jsonl", train, f"data.eval={evaluated}", *words)
        config = compose(*overrides)
        return load_examples(config, load_tokenizer(config.model))

    return make


def texts(examples: Examples, folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return sorted(tokenizer.decode(row["input_ids"]) for row in examples.train)


def alpaca(number: int, *, further: bool) -> dict[str, str]:
    row = {"instruction": "say", "output": f"the number {number}"}
    return row | ({"input": f"{number}"} if further else {})


def pair(number: int, **others: Any) -> dict[str, Any]:
    return {"prompt": f"say {number}", "chosen": f"the number {number}", "rejected": "the dog", **others}


@pytest.mark.parametrize("seed", SEEDS)
def test_each_prompt_has_its_own_second_part(made: Made, plain_llama_folder: Path, seed: int) -> None:
    rows = [alpaca(number, further=number % 2 == 0) for number in range(6)]
    words = ("data.streaming=true", f"data.seed={seed}", f"model.path={plain_llama_folder}")
    prompts = ("say\n\n0", "say", "say\n\n2", "say", "say\n\n4", "say")
    expected = sorted(f"{prompt}the number {number}{END}" for number, prompt in enumerate(prompts))
    for files in ([rows], [rows[:3], rows[3:]]):
        assert texts(made(*files, words=words), plain_llama_folder) == expected


def test_a_second_part_that_only_later_rows_have_is_read(made: Made, plain_llama_folder: Path) -> None:
    rows = [alpaca(1, further=False)] * 1100 + [alpaca(2, further=True)]
    words = ("data.streaming=true", f"model.path={plain_llama_folder}")
    examples = made(rows, held_out=rows[:1], words=words)
    assert sum("say\n\n2" in text for text in texts(examples, plain_llama_folder)) == 1
    assert {name for row in examples.train for name in row} == {"input_ids", "labels"}


@pytest.mark.parametrize("seed", SEEDS)
def test_each_preference_has_its_own_tools(made: Made, seed: int) -> None:
    rows = [pair(number, **({"tools": TOOLS} if number % 2 else {})) for number in range(6)]
    examples = made(rows, words=("task=dpo", "data.streaming=true", f"data.seed={seed}"))
    found = {row["prompt"][0]["content"]: row["tools"] for row in examples.train}
    assert {key: value and json.loads(value) for key, value in found.items()} == {
        f"say {number}": TOOLS if number % 2 else None for number in range(6)
    }


def test_tools_that_only_the_rows_for_evaluation_have_are_kept(made: Made) -> None:
    examples = made([pair(1)], held_out=[pair(2, tools=TOOLS)], words=("task=dpo",))
    assert json.loads(examples.eval[0]["tools"]) == TOOLS


def test_a_second_part_that_only_the_rows_for_evaluation_have_is_read(made: Made, plain_llama_folder: Path) -> None:
    words = (f"model.path={plain_llama_folder}",)
    examples = made([alpaca(1, further=False)], held_out=[alpaca(2, further=True)], words=words)
    assert examples.prompts == ("say\n\n2",)


@pytest.mark.parametrize("seed", SEEDS)
def test_columns_without_use_reach_no_example(made: Made, seed: int) -> None:
    rows = [{"prompt": "say", "completion": "one", **({} if number else {"note": 1})} for number in range(6)]
    examples = made(rows, words=("data.streaming=true", f"data.seed={seed}"))
    assert {name for row in examples.train for name in row} == {"input_ids", "labels"}
    assert "Unused columns: note" in examples.notes


def test_columns_without_use_reach_no_block(made: Made) -> None:
    rows = [{"text": "say one two"}] * 5 + [{"text": "the dog", "note": 1}]
    words = ("task=text", "task.block_size=4", "data.text_column=text", "data.streaming=true")
    assert {name for row in made(rows, words=words).train for name in row} == {"input_ids", "labels"}


def test_streamed_values_are_unchanged() -> None:
    values = ["1", 1, None, [1, "2", {"a": None}], '{"a": 1}']

    def rows() -> Any:
        yield from ({"value": value, **({"note": 1} if number else {})} for number, value in enumerate(values))

    stream = IterableDataset.from_generator(rows)
    stream = with_columns(stream, first_columns(stream))
    assert columns(stream) == ["value", "note"]
    shuffled = list(stream.shuffle(seed=0))
    assert sorted(map(repr, (row["value"] for row in shuffled))) == sorted(map(repr, values))
    assert all(row.keys() == {"value", "note"} for row in shuffled)
