"""Rows in the shapes that people have: what reaches the model, what carries loss, and what is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.conversation import Conversation, find_shape
from loraplus_hydra.tasks.examples import Examples, load_examples
from loraplus_hydra.tasks.tokens import encode_prompt
from tests.support.tiny import ASSISTANT, END, TEMPLATE, USER, chat_tokenizer, ids_of, masked, save_llama, write_jsonl

Made = Callable[..., Examples]
ONE = {"role": "user", "content": "say 1"}
TWO = {"role": "assistant", "content": "the number 1"}
THREE = {"role": "user", "content": "and after"}
FOUR = {"role": "assistant", "content": "the number 2"}
ASSISTANT_ONLY = "task.args.assistant_only_loss=true"
# A template that writes tools, tool calls and tools' answers, and drops what comes before </think>.
TOOLS_TEMPLATE = (
    "{%- if tools -%}{{- tools | tojson -}}{%- endif -%}"
    + TEMPLATE.replace(
        "message['content'] + '<|end|>'",
        "((message['content'] or '') + call(message)).split('</think>')[-1] + '<|end|>'",
    )
).replace(
    "{%- for message in messages -%}",
    "{%- macro call(message) -%}"
    "{%- for each in message.tool_calls or [] -%}{{- each.function | tojson -}}{%- endfor -%}"
    "{%- endmacro -%}{%- for message in messages -%}",
    1,
)


@pytest.fixture(scope="module")
def tools_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tools_llama"), chat_tokenizer(TOOLS_TEMPLATE))


@pytest.fixture
def made(compose: Callable[..., Any], tmp_path: Path) -> Made:
    """Examples of the sft task for a model's folder and rows; the same rows are evaluated on."""

    def make(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Examples:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        files = ("data=jsonl", f"data.train={path}", f"data.eval={path}")
        config = compose("model=hub", f"model.path={folder}", *files, *overrides)
        return load_examples(config, load_tokenizer(config.model))

    return make


def ids(folder: Path, *parts: str) -> list[int]:
    return ids_of(AutoTokenizer.from_pretrained(folder), *parts)


def test_alpacas_input_stands_in_the_prompt(made: Made, llama_folder: Path) -> None:
    rows = [{"instruction": "say", "input": number, "output": "the number"} for number in ("1", "")]
    examples = made(llama_folder, rows)
    answer = ids(llama_folder, "the number", END)
    for row, prompt in zip(examples.train, ("say\n\n1", "say"), strict=True):
        asked = ids(llama_folder, USER, prompt, END, ASSISTANT)
        assert row == {"input_ids": asked + answer, "labels": masked(asked) + answer}
    assert not examples.notes


def test_columns_that_no_part_reads_are_named_once(made: Made, llama_folder: Path) -> None:
    rows = [{"prompt": "say", "completion": "one", "score": 1, "id": "a"}]
    assert [note for note in made(llama_folder, rows).notes if "Unused" in note] == ["Unused columns: score, id"]


def test_keys_of_messages_that_the_template_ignores_are_named(made: Made, llama_folder: Path) -> None:
    rows = [{"messages": [ONE, TWO | {"name": "bob"}], "tools": [{"name": "f"}]}]
    assert "Not used by the chat template: name, tools (train rows)" in made(llama_folder, rows).notes


def test_a_system_column_is_the_first_message(made: Made, llama_folder: Path) -> None:
    row = made(llama_folder, [{"system": "the fox", "messages": [ONE, TWO]}], ASSISTANT_ONLY).train[0]
    asked = ids(llama_folder, USER, "the fox", END, USER, "say 1", END, ASSISTANT)
    answer = ids(llama_folder, "the number 1", END)
    assert row["input_ids"] == asked + answer
    assert row["labels"] == masked(asked) + answer
    both = [{"system": "the fox", "messages": [{"role": "system", "content": "a dog"}, ONE, TWO]}]
    with pytest.raises(
        ConfigErrors, match="is a system message, but the messages begin with a different system message"
    ):
        made(llama_folder, both)


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("loss_weight", 0.0), ("train", False), ("loss", False)])
@pytest.mark.parametrize("assistant_only", [True, False])
def test_a_turn_of_no_weight_carries_no_loss(
    made: Made, llama_folder: Path, key: str, value: Any, assistant_only: bool
) -> None:
    rows = [{"messages": [ONE, TWO | {key: value}, THREE, FOUR | {key: type(value)(1)}]}]
    row = made(llama_folder, rows, f"task.args.assistant_only_loss={str(assistant_only).lower()}").train[0]
    first, silent = ids(llama_folder, USER, "say 1", END, ASSISTANT), ids(llama_folder, "the number 1", END)
    second, answer = ids(llama_folder, USER, "and after", END, ASSISTANT), ids(llama_folder, "the number 2", END)
    assert row["input_ids"] == first + silent + second + answer
    if assistant_only:
        assert row["labels"] == masked(first + silent + second) + answer
    else:
        assert row["labels"] == first + masked(silent) + second + answer


def test_a_weight_between_none_and_all_is_an_error(made: Made, llama_folder: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"message 2: 'messages' has a message with weight the number 0\.5"):
        made(llama_folder, [{"messages": [ONE, TWO | {"weight": 0.5}]}])
    with pytest.raises(ConfigErrors, match="no message has loss"):
        made(llama_folder, [{"messages": [ONE, TWO | {"weight": 0}]}], ASSISTANT_ONLY)


@pytest.mark.parametrize("key", ["text", "value"])
def test_parts_of_text_are_joined(made: Made, llama_folder: Path, key: str) -> None:
    parts = [{"type": "text", key: "the number"}, {"type": "text", key: " 1"}]
    row = made(llama_folder, [{"messages": [ONE, {"role": "assistant", "content": parts}]}]).train[0]
    assert row["input_ids"] == ids(llama_folder, USER, "say 1", END, ASSISTANT, "the number 1", END)
    with pytest.raises(ConfigErrors, match="part of the type 'image'"):
        made(llama_folder, [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TWO]}])


def test_sharegpts_calls_and_observations_are_tool_calls_and_tools(made: Made, tools_folder: Path) -> None:
    turns = [
        {"from": "human", "value": "say 1"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "a card"},
        {"from": "gpt", "value": "the number 1"},
    ]
    row = made(tools_folder, [{"conversations": turns, "tools": '[{"name": "f"}]'}], ASSISTANT_ONLY).train[0]
    first = ids(tools_folder, '[{"name": "f"}]', USER, "say 1", END, ASSISTANT)
    call = ids(tools_folder, '{"name": "f", "arguments": {"x": 1}}', END)
    second, answer = ids(tools_folder, USER, "a card", END, ASSISTANT), ids(tools_folder, "the number 1", END)
    assert row["input_ids"] == first + call + second + answer
    assert row["labels"] == masked(first) + call + masked(second) + answer


def test_arguments_in_json_text_and_nulls_of_a_schema_are_no_part_of_a_call(
    made: Made, tools_folder: Path, tmp_path: Path
) -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    rows = [{"messages": [ONE, call({"x": "1"})]}, {"messages": [ONE, call({"y": "2"})]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    parquet = ("data=parquet", f"data.train={tmp_path / 'rows.parquet'}", f"data.eval={tmp_path / 'rows.parquet'}")
    expected = ids(tools_folder, USER, "say 1", END, ASSISTANT, '{"name": "f", "arguments": {"x": "1"}}', END)
    assert made(tools_folder, rows, *parquet).train[0]["input_ids"] == expected
    assert made(tools_folder, [{"messages": [ONE, call('{"x": "1"}')]}]).train[0]["input_ids"] == expected
    # A null in JSON is the row's own.
    null = made(tools_folder, [{"messages": [ONE, call({"x": None})]}]).train[0]["input_ids"]
    assert null == ids(tools_folder, USER, "say 1", END, ASSISTANT, '{"name": "f", "arguments": {"x": null}}', END)


def test_text_that_the_template_drops_is_reported_with_its_row(made: Made, tools_folder: Path) -> None:
    rows = [{"prompt": "say", "completion": "one"}, {"prompt": "say", "completion": "<think>the fox</think>one"}]
    notes = "\n".join(made(tools_folder, rows).notes)
    assert "In 1 of 2 train rows (first: " in notes
    assert "rows.jsonl, line 2) the chat template omits or changes text of the assistant" in notes


def test_an_answer_without_an_end_is_reported(made: Made, tmp_path: Path) -> None:
    endless = TEMPLATE.replace("message['content'] + '<|end|>'", "message['content']", 1)
    folder = save_llama(tmp_path / "endless", chat_tokenizer(endless))
    notes = made(folder, [{"messages": [ONE, TWO]}], ASSISTANT_ONLY).notes
    assert any("no token that ends the answer has loss" in note for note in notes)


@pytest.mark.parametrize("adds", ["bos", "eos", "both"])
def test_a_tokenizer_that_adds_ends_gives_each_row_one_and_its_prompt_none(
    made: Made, tmp_path: Path, adds: str
) -> None:
    from tokenizers import processors

    tokenizer = chat_tokenizer(None)
    bos, eos = ("<|user|> " if adds != "eos" else ""), (f" {END}" if adds != "bos" else "")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (USER, END)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}$A{eos}", special_tokens=special
    )
    folder = save_llama(tmp_path / "ends", tokenizer)
    row = made(folder, [{"prompt": "say 1", "completion": " the number 1"}]).train[0]
    prompt = ids(folder, *([USER] if bos else []), "say 1")
    answer = ids(folder, " the number 1", END)
    assert row == {"input_ids": prompt + answer, "labels": masked(prompt) + answer}
    assert encode_prompt("say 1", AutoTokenizer.from_pretrained(folder), special_tokens=True) == prompt


def test_a_callable_of_ones_own_with_the_usual_columns_needs_no_mapping(llama_folder: Path) -> None:
    from omegaconf import OmegaConf

    rows = Dataset.from_list([{"messages": [ONE, TWO, THREE, FOUR]}])
    shape = find_shape(DatasetDict(train=rows, eval=rows), OmegaConf.create({"_target_": "mine"}))
    assert shape.messages == "messages"
    asked = shape.ask(rows[0], "", chat=True)
    assert isinstance(asked, Conversation)
    assert asked.turns == [ONE, TWO, THREE]
