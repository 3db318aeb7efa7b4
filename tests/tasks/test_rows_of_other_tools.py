"""Rows as other tools and people write them: read right, or refused with one message that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from omegaconf import OmegaConf

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from tests.support.tiny import save_llama, write_jsonl
from tests.support.words import TEMPLATE, word_tokenizer, written_rows

Rows = list[dict[str, Any]] | str  # objects of a JSONL file, or the text of a CSV
ONLY = "task.args.assistant_only_loss=true"
SAY = {"role": "user", "content": "say one"}
ONE = {"role": "assistant", "content": "one"}
ANSWERED = "<user> say one <end> <assistant> [one <end>]"
CLASSIFY = "task=classification"


@pytest.fixture
def made(compose: Callable[..., Any], tmp_path: Path, words_folder: Path) -> Callable[..., Examples]:
    """Return a function from rows and overrides to the task's examples."""

    def make(rows: Rows, *overrides: str, folder: Path = words_folder) -> Examples:
        suffix = "csv" if isinstance(rows, str) else "jsonl"
        path = tmp_path / f"rows.{suffix}"
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8", newline="")
        else:
            write_jsonl(path, rows)
        groups = [each for each in overrides if each.startswith("experiment=")]
        files = (f"data={suffix}", f"data.train={path}", f"data.eval={path}")
        config = compose(*groups, "model=hub", f"model.path={folder}", *files, *overrides)
        return load_examples(config, load_tokenizer(config.model))

    return make


READ: dict[str, tuple[Rows, str]] = {
    "OpenAI before tools": (
        [
            {
                "messages": [
                    SAY,
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                ],
                "functions": [{"name": "f"}],
            }
        ],
        "tools: f <user> say one <end> <assistant> [call f <end>]",
    ),
    "Mistral, a call without content": (
        [
            {
                "messages": [
                    SAY,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
                ]
            }
        ],
        "<user> say one <end> <assistant> [call f x 1 <end>]",
    ),
    "OASST's roles": ([{"messages": [{**SAY, "role": "prompter"}, ONE]}], ANSWERED),
    "a list of no tool calls": ([{"messages": [SAY, {**ONE, "tool_calls": [], "refusal": None}]}], ANSWERED),
    "ShareGPT's chatgpt": (
        [{"conversations": [{"from": "human", "value": "say one"}, {"from": "chatgpt", "value": "one"}]}],
        ANSWERED,
    ),
    "a CSV of messages": (
        'messages\n"[{""from"": ""human"", ""value"": ""say one""}, {""from"": ""gpt"", ""value"": ""one""}]"\n',
        ANSWERED,
    ),
    "a CSV with quotes, line ends and a mark": ('\ufeffprompt,completion\r\n"say\n\none","one"\r\n\r\n', ANSWERED),
    "an empty system turn": (
        [{"messages": [{"role": "system", "content": ""}, SAY, ONE]}],
        f"<system> <end> {ANSWERED}",
    ),
    "an index of pandas": (",prompt,completion\n0,say one,one\n", ANSWERED),
}


@pytest.mark.parametrize("name", READ)
def test_rows_are_read(made: Callable[..., Examples], name: str) -> None:
    rows, expected = READ[name]
    overrides = () if isinstance(rows, str) and "completion" in rows else (ONLY,)
    assert written_rows(made(rows, *overrides).train) == [expected]


REFUSED: dict[str, tuple[Rows, tuple[str, ...], str]] = {
    "names that are no usual ones": (
        [{"question": "say", "answer": "one"}],
        (),
        "set your columns: data.prompt_column=question data.completion_column=answer",
    ),
    "a column of turns": ([{"conversation": [SAY, ONE]}], (), "set your columns: data.messages_column=conversation"),
    "another delimiter": ("prompt;completion\nsay;one\n", (), """data.delimiter='";"'"""),
    "parts that are no text": (
        [{"messages": [SAY, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}],
        (),
        "a part of the type 'tool_use'",
    ),
    "Python's own notation": ("messages\n\"[{'role': 'user'}]\"\n", (), "'messages' is not JSON"),
    "one of two shapes a row": (
        [{"prompt": "say", "completion": "one"}, {"messages": [SAY, ONE]}],
        (),
        "can be read as",
    ),
    "one-hot labels": (
        [{"text": "one", "label": [1, 0]}, {"text": "two", "label": [0, 1]}],
        (CLASSIFY, "task.metric=eval_f1"),
        "lists of 2 zeros and ones, one for each label",
    ),
    "a label twice": (
        [{"text": "one", "label": ["a", "a"]}, {"text": "two", "label": ["b"]}],
        (CLASSIFY, "task.metric=eval_f1"),
        "line 1: 'label' names a label twice",
    ),
    "measured numbers in a CSV": ("text,label\none,0.5\ntwo,2\n", (CLASSIFY,), "regression has no 'eval_accuracy'"),
    "KTO's label by another name": (
        [{"prompt": "say", "completion": "one", "kto_tag": True}],
        ("experiment=kto",),
        "data.label_column: .* the columns are prompt, completion, kto_tag",
    ),
    "no answers to compare": (
        [{"prompt": "say", "answers": ["one"]}],
        ("task=dpo",),
        "data.chosen_column: .* the columns are prompt, answers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_are_refused_with_what_to_do(made: Callable[..., Examples], name: str) -> None:
    rows, overrides, message = REFUSED[name]
    with pytest.raises(ConfigErrors, match=message):
        made(rows, *overrides)


NOTED: dict[str, tuple[Rows, tuple[str, ...], str]] = {
    "no answer": ([{"messages": [SAY, ONE, SAY]}], (), "line 1) the conversation ends without an answer"),
    "labels that look alike": (
        [{"text": "one", "label": "Yes"}, {"text": "two", "label": "yes "}],
        (CLASSIFY,),
        "Labels that differ only in case or spaces: 'Yes', 'yes '",
    ),
    "answers that repeat the prompt": (
        [{"prompt": "say one", "chosen": "say one two", "rejected": "say one fox"}],
        ("task=dpo",),
        "line 1) both answers begin with the prompt",
    ),
    "tools of a Trainer that has none": (
        [{"prompt": "say one", "chosen": "two", "rejected": "fox", "tools": [{"name": "f"}]}],
        ("experiment=orpo",),
        "ORPOTrainer may not pass tools to the chat template",
    ),
    "a column without a name": (",prompt,completion\n0,say one,one\n", (), "Unused columns: ''"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_may_be_meant_otherwise_is_noted(made: Callable[..., Examples], name: str) -> None:
    rows, overrides, note = NOTED[name]
    assert any(note in each for each in made(rows, *overrides).notes)


def test_roles_that_the_template_leaves_out_are_named(made: Callable[..., Examples], tmp_path: Path) -> None:
    template = TEMPLATE.replace("{%- else -%}", "{%- elif message['role'] == 'user' -%}", 1)
    folder = save_llama(tmp_path / "model", word_tokenizer(template))
    rows = [{"messages": [{"role": "system", "content": "be brief"}, SAY, ONE]}]
    notes = made(rows, folder=folder).notes
    assert "Not used by the chat template: messages of the role 'system' (train rows)" in notes


def test_a_csvs_lists_and_numbers_are_labels(made: Callable[..., Examples]) -> None:
    several = made('text,label\none,"[""a"", ""b""]"\ntwo,[]\n', CLASSIFY, "task.metric=eval_f1")
    assert list(several.train["labels"]) == [[1.0, 1.0], [0.0, 0.0]]
    measured = made("text,label\none,0.5\ntwo,2\n", CLASSIFY, "task.metric=eval_pearson")
    assert list(measured.train["labels"]) == [0.5, 2.0]
    assert not measured.notes


def test_rows_beyond_what_a_rotary_model_was_made_for_are_noted(
    made: Callable[..., Examples], compose: Callable[..., Any], tmp_path: Path, words_folder: Path
) -> None:
    from loraplus_hydra.training.prepare import prepare_examples

    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one " * 200}, {"text": "one"}])
    files = ("data=jsonl", f"data.train={path}", f"data.eval={path}")
    config = compose("model=hub", f"model.path={words_folder}", *files)  # its max_position_embeddings is 128
    notes = prepare_examples(config, load_tokenizer(config.model)).notes
    assert any(
        note.startswith("1 of 2 train rows are longer than the 128 tokens for which the model was") for note in notes
    )
    config = compose("model=hub", f"model.path={words_folder}", *files, "task.args.max_length=128")
    notes = prepare_examples(config, load_tokenizer(config.model)).notes
    assert any(note.startswith("1 of 2 train rows are longer than 128 tokens: their ends") for note in notes)


OWN: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "prompts": ("sft", [{"prompt": "say one", "completion": "one"}]),
    "messages": ("sft", [{"messages": [SAY, ONE]}]),
    "text": ("sft", [{"text": "one"}]),
    "blocks": ("text", [{"text": "one two"}]),
    "labels": ("classification", [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]),
    "preferences": ("dpo", [{"prompt": "say one", "chosen": "one", "rejected": "two"}]),
    "judged": ("kto", [{"messages": [SAY, ONE], "label": label} for label in (True, False)]),
}


@pytest.mark.parametrize("name", OWN)
def test_a_function_of_ones_own_with_the_usual_columns_needs_no_mapping(
    name: str, compose: Callable[..., Any], words_folder: Path
) -> None:
    task, rows = OWN[name]
    group = ("experiment=kto", "data.train=unread") if task == "kto" else (f"task={task}",)
    config = compose(*group, "model=hub", f"model.path={words_folder}", "task.samples=0")
    made = Dataset.from_list(rows)
    function = locate(config.task.examples)
    arguments = {"block_size": 16} if task == "text" else {}
    examples = function(
        DatasetDict(train=made, eval=made),
        load_tokenizer(config.model),
        config.task,
        OmegaConf.create({"_target_": "mine"}),
        **arguments,
    )
    assert len(examples.train) == len(rows)
    assert not any("unused" in note.lower() for note in examples.notes)
