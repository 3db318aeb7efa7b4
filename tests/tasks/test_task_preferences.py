"""Preferences in the shapes that people have: each becomes what TRL's own format of the same preference is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.data_utils import extract_prompt

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from tests.support.tiny import ASSISTANT, END, TEMPLATE, USER, chat_tokenizer, ids_of, save_llama, write_jsonl

Made = Callable[..., Examples]
ASK = {"role": "user", "content": "say 1"}
GOOD = {"role": "assistant", "content": "the number 1"}
BAD = {"role": "assistant", "content": "the dog"}
SYSTEM = {"role": "system", "content": "the fox"}
PAIR = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
LATER = {"prompt": [ASK, GOOD, {"role": "user", "content": "and after"}], "chosen": [GOOD], "rejected": [BAD]}
TOOLS_TEMPLATE = TEMPLATE.replace(
    "message['content'] + '<|end|>'", "(message['content'] or (message.tool_calls | tojson)) + '<|end|>'", 1
).replace("{%- for", "{{- tools | tojson if tools -}}{%- for", 1)


def shared(message: dict[str, str]) -> dict[str, str]:
    return {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": ({"prompt": "say 1", "chosen": "the number 1", "rejected": "the dog"}, PAIR),
    "messages": ({"prompt": "say 1", "chosen": GOOD, "rejected": BAD}, PAIR),
    "lists of messages": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
    "a list, then texts": ({"prompt": [ASK], "chosen": "the number 1", "rejected": "the dog"}, PAIR),
    "whole conversations": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, PAIR),
    "UltraFeedback": (
        {
            "prompt": " say 1\n",
            "prompt_id": "a",
            "chosen": [ASK, GOOD],
            "rejected": [ASK, BAD],
            "messages": [ASK, GOOD],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        PAIR,
    ),
    "ShareGPT": (
        {"conversations": [shared(turn) for turn in LATER["prompt"]], "chosen": shared(GOOD), "rejected": shared(BAD)},
        LATER,
    ),
    "the messages before": ({"messages": LATER["prompt"], "chosen": GOOD, "rejected": BAD}, LATER),
    "a history before whole turns": (
        {"prompt": LATER["prompt"][:2], "chosen": [LATER["prompt"][2], GOOD], "rejected": [LATER["prompt"][2], BAD]},
        LATER,
    ),
    "Alpaca": ({"instruction": "say", "input": "1", "chosen": "the number 1", "rejected": "the dog"}, None),  # type: ignore[dict-item]
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: say 1\n\nAssistant: the number 1\n\nHuman: and after\n\nAssistant: the number 1",
            "rejected": "\n\nHuman: say 1\n\nAssistant: the number 1\n\nHuman: and after\n\nAssistant: the dog",
        },
        LATER,
    ),
    "a system column": (
        {"system": "the fox", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {**PAIR, "prompt": [SYSTEM, ASK]},
    ),
    "JSON in text": ({"chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])}, PAIR),
}
SHAPES["Alpaca"] = (SHAPES["Alpaca"][0], {**PAIR, "prompt": [{"role": "user", "content": "say\n\n1"}]})


@pytest.fixture
def made(compose: Callable[..., Any], tmp_path: Path) -> Made:
    """Return a function from a model's folder and rows to the task's examples."""

    def make(folder: Path, rows: list[dict[str, Any]], *overrides: str, task: str = "task=dpo") -> Examples:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        files = ("data=jsonl", f"data.train={path}", f"data.eval={path}")
        config = compose("model=hub", f"model.path={folder}", task, *files, *overrides)
        return load_examples(config, load_tokenizer(config.model))

    return make


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_the_same_preference(made: Made, llama_folder: Path, name: str) -> None:
    row, expected = SHAPES[name]
    examples = made(llama_folder, [row])
    assert examples.train[0] == expected
    assert examples.prompts == (expected["prompt"][-1]["content"],)
    assert examples.references == (expected["chosen"][0]["content"],)


def test_columns_that_no_answer_needs_are_named(made: Made, llama_folder: Path) -> None:
    notes = made(llama_folder, [SHAPES["UltraFeedback"][0]]).notes
    assert notes == ("Unused columns: prompt_id, messages, score_chosen, score_rejected",)


def test_what_the_answers_share_is_the_prompt_as_trl_finds_it(made: Made, plain_llama_folder: Path) -> None:
    row = {"chosen": "the fox jumps over one", "rejected": "the fox jumps over two"}
    assert made(plain_llama_folder, [row]).train[0] == extract_prompt(row)
    turns = "\n\nHuman: say 1\n\nAssistant:"
    row = {"chosen": f"{turns} the number 1", "rejected": f"{turns} the dog"}
    expected = {"prompt": turns, "chosen": " the number 1", "rejected": " the dog"}
    assert made(plain_llama_folder, [row]).train[0] == expected


def trainers_rows(model: Path, examples: Examples, tmp_path: Path) -> Dataset:
    """Return the rows with tokens that TRL's Trainer makes of `examples`."""
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(tmp_path / "out", bf16=False, use_cpu=True, report_to="none"),
        train_dataset=examples.train,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return trainer.train_dataset


def test_the_trainer_compares_the_tokens_after_the_prompt(made: Made, llama_folder: Path, tmp_path: Path) -> None:
    examples = made(llama_folder, [SHAPES["HH-RLHF"][0]] * 2)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    row = trainers_rows(llama_folder, examples, tmp_path)[0]
    first = ids_of(tokenizer, USER, "say 1", END, ASSISTANT, "the number 1", END, USER, "and after", END, ASSISTANT)
    assert row["prompt_ids"] == first
    assert row["chosen_ids"] == ids_of(tokenizer, "the number 1", END)
    assert row["rejected_ids"] == ids_of(tokenizer, "the dog", END)


def test_tools_and_calls_reach_the_template_without_keys_of_other_rows(made: Made, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tools", chat_tokenizer(TOOLS_TEMPLATE))

    def call(**arguments: int) -> dict[str, Any]:
        return {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": arguments}}]}

    rows = [{"messages": [ASK], "chosen": call(**{key: 1}), "rejected": BAD, "tools": [{key: 1}]} for key in "xy"]
    examples = made(folder, rows)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = '[{"type": "function", "function": {"arguments": {"KEY": 1}}}]'
    for row, key in zip(trainers_rows(folder, examples, tmp_path), "xy", strict=True):
        assert row["prompt_ids"] == ids_of(tokenizer, f'[{{"{key}": 1}}]', USER, "say 1", END, ASSISTANT)
        assert row["chosen_ids"] == ids_of(tokenizer, written.replace("KEY", key), END)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"chosen": "yes", "rejected": "no"}, r"'chosen' has no prompt; .*task\.chat=false"),
    "no column": ({"prompt": "say", "chosen": "yes"}, r"data\.rejected_column: .* no column 'rejected'"),
    "empty prompt": ({"prompt": " ", "chosen": "yes", "rejected": "no"}, "'prompt' is empty"),
    "empty answer": ({"prompt": "say", "chosen": "", "rejected": "no"}, "'chosen' is empty"),
    "equal": ({"prompt": "say", "chosen": "no", "rejected": "no"}, "no preference"),
    "null": ({"prompt": "say", "chosen": "no", "rejected": None}, "'rejected' is null"),
    "two kinds": ({"prompt": "say", "chosen": "no", "rejected": [BAD]}, "one is text, the other is messages"),
    "a question last": ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "ends with a message with the role 'user'"),
    "other prompts": (
        {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "x"}, BAD]},
        "begin with no common prompt",
    ),
    "another prompt": (
        {"prompt": "x", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        r"'prompt' is different from the prompt .*data\.prompt_column=null to use only",
    ),
    "dialogues that share white space alone": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\nHuman: c\n\nAssistant: d"},
        "'chosen'",
    ),
    "dialogues that differ before an answer": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
        "'chosen'",
    ),
    "an answered question": ({"messages": [ASK, GOOD], "chosen": GOOD, "rejected": BAD}, "ends with an answer"),
    "without loss": ({"prompt": "x", "chosen": [{**GOOD, "weight": 0}], "rejected": [BAD]}, "message without loss"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_no_preference_is_an_error_of_the_row(made: Made, llama_folder: Path, name: str) -> None:
    row, message = ERRORS[name]
    with pytest.raises(ConfigErrors, match=message):
        made(llama_folder, [row])


@pytest.mark.parametrize("pair", [("say: yes", "say: yes sir"), ("say: yes sir", "say: yes")])
def test_an_answer_that_continues_the_other_one_needs_a_prompt_of_its_own(
    made: Made, plain_llama_folder: Path, pair: tuple[str, str]
) -> None:
    row = dict(zip(("chosen", "rejected"), pair, strict=True))
    with pytest.raises(ConfigErrors, match=r"unknown where the prompt ends; .*data\.prompt_column"):
        made(plain_llama_folder, [row], "task.chat=false")
    whole = made(plain_llama_folder, [{"prompt": "say:", **{name: text[4:] for name, text in row.items()}}])
    assert whole.prompts == ("say:",)


def test_messages_need_a_template(made: Made, plain_llama_folder: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"task\.chat: .*line 1 has messages"):
        made(plain_llama_folder, [{"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}])


JUDGED = {"prompt": [ASK], "completion": [GOOD], "label": True}
JUDGED_SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "say 1", "completion": "the number 1", "label": True},
    "lists": {"prompt": [ASK], "completion": [GOOD], "label": "true"},
    "a text and a message": {"prompt": "say 1", "completion": GOOD, "label": 1},
    "a conversation": {"messages": [ASK, GOOD], "label": True},
    "ShareGPT": {"conversations": [shared(ASK), shared(GOOD)], "label": True},
    "Alpaca": {"instruction": "say 1", "input": "", "output": "the number 1", "label": True},
}


@pytest.mark.parametrize("name", JUDGED_SHAPES)
def test_judged_answers_of_each_shape_are_the_same(made: Made, llama_folder: Path, name: str) -> None:
    row = JUDGED_SHAPES[name]
    examples = made(llama_folder, [row, {**row, "label": False}], task="experiment=kto")
    assert sorted(examples.train, key=str) == [{**JUDGED, "label": False}, JUDGED]
    assert (examples.prompts, examples.references) == (("say 1",), ("the number 1",))
    assert examples.notes == ("1 good and 1 bad answers for training",)


def test_judged_rows_without_question_or_answer_are_errors(made: Made, llama_folder: Path) -> None:
    for turns in ([ASK], [GOOD]):
        with pytest.raises(ConfigErrors, match="'messages' has no prompt before an answer of the assistant"):
            made(llama_folder, [{"messages": turns, "label": True}], task="experiment=kto")
    with pytest.raises(ConfigErrors, match="task=dpo learns from pairs"):
        made(llama_folder, [SHAPES["texts"][0]], task="experiment=kto")
    with pytest.raises(ConfigErrors, match=r"data\.label_column: .*the columns are prompt, completion, kto_tag"):
        made(llama_folder, [{"prompt": "a", "completion": "b", "kto_tag": True}], task="experiment=kto")


def test_rows_longer_than_the_limit_are_counted(made: Made, llama_folder: Path) -> None:
    row = SHAPES["texts"][0]
    notes = made(llama_folder, [row, {**row, "rejected": "dog " * 40}], "task.args.max_length=20").notes
    assert "1 of 2 train rows are longer than 20 tokens: their ends are cut off." in notes


@pytest.mark.parametrize("task", ["task=dpo", "experiment=kto"])
def test_prompts_that_fill_the_limit_are_counted_before_training(made: Made, llama_folder: Path, task: str) -> None:
    short = SHAPES["texts"][0] if task == "task=dpo" else JUDGED_SHAPES["texts"]
    long = {**short, "prompt": "dog " * 40}
    rows = [short, long] if task == "task=dpo" else [short, {**short, "label": False}, long]
    notes = made(llama_folder, rows, "task.args.max_length=20", task=task).notes
    assert "1 of these have no token left to learn and are omitted." in notes
    if task != "task=dpo":
        rows = [rows[2], {**rows[2], "label": False}]
    with pytest.raises(ConfigErrors, match=r"task\.args\.max_length: after cutting to 20 tokens, no train row"):
        made(llama_folder, rows[-2:] if task != "task=dpo" else [long], "task.args.max_length=20", task=task)


def test_text_that_the_template_drops_is_reported(made: Made, tmp_path: Path) -> None:
    strip = TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]", 1)
    folder = save_llama(tmp_path / "strip", chat_tokenizer(strip))
    notes = made(folder, [{**SHAPES["texts"][0], "chosen": "<think>the fox</think>one"}]).notes
    assert any("line 1) the chat template omits or changes text of the assistant" in note for note in notes)


def test_dataset_rows_keep_their_types(llama_folder: Path, compose: Callable[..., Any], tmp_path: Path) -> None:
    """Parquet gives each message all keys that any has, as nulls."""
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"chosen": [{**ASK, "name": "bob"}, GOOD], "rejected": [ASK, BAD]}]).to_parquet(path)
    files = ("data=parquet", f"data.train={path}", f"data.eval={path}")
    config = compose("model=hub", f"model.path={llama_folder}", "task=dpo", *files)
    with pytest.raises(ConfigErrors, match="no common prompt"):  # the first messages differ by a name
        load_examples(config, load_tokenizer(config.model))
    Dataset.from_list([{"chosen": [ASK, {**GOOD, "name": "bob"}], "rejected": [ASK, BAD]}]).to_parquet(path)
    assert load_examples(config, load_tokenizer(config.model)).train[0]["rejected"] == [BAD]
