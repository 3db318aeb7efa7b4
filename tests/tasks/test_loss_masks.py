"""The tokens that a row becomes, and those that carry loss, counted by hand; see tests/support/words.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.check import check
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.preview import preview
from loraplus_hydra.tasks.examples import Examples, load_examples
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.prepare import prepare
from tests.support.tiny import save_llama, write_jsonl
from tests.support.words import previewed, word_tokenizer, written, written_rows

ONLY = "task.args.assistant_only_loss=true"
SAY = {"role": "user", "content": "say one"}
ONE = {"role": "assistant", "content": "one"}
AND = {"role": "user", "content": "and after"}
TWO = {"role": "assistant", "content": "the number two"}
TURNS = [SAY, ONE, AND, TWO]
ALL = "[<user> say one <end> <assistant> one <end> <user> and after <end> <assistant> the number two <end>]"
MARKED = "<user> say one <end> <assistant> [one <end>] <user> and after <end> <assistant> [the number two <end>]"
LAST = "<user> say one <end> <assistant> one <end> <user> and after <end> <assistant> [the number two <end>]"
PAIR = {"prompt": "say one", "completion": " one"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}
SHARED = [
    {"from": "human", "value": "say one"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    {"from": "observation", "value": "2"},
    {"from": "gpt", "value": "the number two"},
]
CALLED = (
    "tools: f <user> say one <end> <assistant> [call f x 1 <end>] <tool> 2 <end> <assistant> [the number two <end>]"
)


@dataclass(frozen=True)
class Case:
    """A row, its overrides, and what is expected of it."""

    row: dict[str, Any]
    expected: str
    overrides: tuple[str, ...] = ()
    template: bool = True
    adds: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    "texts in a template": Case(PAIR, "<user> say one <end> <assistant> [one <end>]"),
    "texts": Case(PAIR, "say one [one <end>]", template=False),
    "texts, template off": Case(PAIR, "say one [one <end>]", ("task.chat=false",)),
    "texts, loss everywhere": Case(
        PAIR, "[say one one <end>]", ("task.args.completion_only_loss=false",), template=False
    ),
    "texts, tokenizer adds a beginning": Case(PAIR, "<begin> say one [one <end>]", template=False, adds=("bos",)),
    "texts, tokenizer adds an end": Case(PAIR, "say one [one <end>]", template=False, adds=("eos",)),
    "texts, tokenizer adds both": Case(PAIR, "<begin> say one [one <end>]", template=False, adds=("bos", "eos")),
    "texts that end themselves": Case(
        {**PAIR, "completion": " one <end>"}, "say one [one <end>]", template=False, adds=("eos",)
    ),
    "texts that begin themselves": Case(
        {**PAIR, "prompt": "<begin> say one"}, "<begin> say one [one <end>]", template=False, adds=("bos",)
    ),
    "plain text that begins and ends itself": Case(
        {"text": "<begin> the fox <end>"}, "[<begin> the fox <end>]", adds=("bos", "eos")
    ),
    "a template's tokens are not doubled": Case(
        PAIR, "<user> say one <end> <assistant> [one <end>]", adds=("bos", "eos")
    ),
    "plain text": Case({"text": "the fox"}, "[the fox <end>]"),
    "plain text, tokenizer adds both": Case({"text": "the fox"}, "[<begin> the fox <end>]", adds=("bos", "eos")),
    "Alpaca": Case(
        {"instruction": "say", "input": "one", "output": "one"}, "<user> say one <end> <assistant> [one <end>]"
    ),
    "messages": Case({"messages": TURNS}, ALL),
    "messages, the assistant's turns": Case({"messages": TURNS}, MARKED, (ONLY,)),
    "prompt and completion of messages": Case({"prompt": TURNS[:3], "completion": TURNS[3:]}, LAST),
    "a text prompt, an answer of messages": Case(
        {"prompt": "say one", "completion": [ONE]}, MARKED.split(" <user>")[0]
    ),
    "a turn of weight 0": Case({"messages": [SAY, {**ONE, "weight": 0}, AND, TWO]}, LAST, (ONLY,)),
    "a turn of weight 0, loss everywhere": Case(
        {"messages": [SAY, {**ONE, "train": False}, AND, TWO]},
        ALL.replace("one <end> <user> and", "one <end> [<user> and").replace("<assistant> one", "<assistant>] one", 1),
    ),
    "a system column": Case(
        {"system": "be brief", "messages": [SAY, ONE]},
        "<system> be brief <end> <user> say one <end> <assistant> [one <end>]",
        (ONLY,),
    ),
    "parts of text": Case(
        {"messages": [SAY, {"role": "assistant", "content": [{"type": "text", "text": "the"}, " number"]}]},
        "<user> say one <end> <assistant> [the number <end>]",
        (ONLY,),
    ),
    "tool calls": Case(
        {"tools": [{"type": "function", "function": {"name": "f"}}]}
        | {"messages": [SAY, CALL, {"role": "tool", "content": "2"}, TWO]},
        CALLED,
        (ONLY,),
    ),
    "ShareGPT with tools": Case({"conversations": SHARED, "tools": '[{"name": "f"}]'}, CALLED, (ONLY,)),
    **{
        f"call without arguments: {way}": Case(
            {"messages": [SAY, {"role": "assistant", "tool_calls": [{"function": {"name": "f", **way}}]}]},
            "<user> say one <end> <assistant> [call f <end>]",
            (ONLY,),
        )
        for way in ({"arguments": "{}"}, {"arguments": ""}, {"arguments": None}, {"arguments": "null"}, {})
    },
    "an answer that is JSON": Case(
        {"prompt": "say one", "completion": '[{"from": "x", "to": "f"}]'},
        "<user> say one <end> <assistant> [<unknown> <unknown> <unknown> <unknown> <end>]",
    ),
    "messages as JSON text": Case({"messages": json.dumps(TURNS)}, MARKED, (ONLY,)),
}


@pytest.fixture
def made(
    compose: Callable[..., Any], tmp_path: Path, words_folder: Path, plain_words_folder: Path
) -> Callable[..., Examples]:
    """Return a function from a case to the task's examples."""

    def make(case: Case, *overrides: str) -> Examples:
        folder = words_folder if case.template else plain_words_folder
        if case.adds:
            tokenizer = word_tokenizer(*([] if case.template else [None]), adds=case.adds)
            folder = save_llama(tmp_path / "model", tokenizer)
        path = write_jsonl(tmp_path / "rows.jsonl", [case.row])
        files = ("data=jsonl", f"data.train={path}", f"data.eval={path}")
        config = compose("model=hub", f"model.path={folder}", *files, *case.overrides, *overrides)
        return load_examples(config, load_tokenizer(config.model))

    return make


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_loss_are_those_counted_by_hand(made: Callable[..., Examples], name: str) -> None:
    case = CASES[name]
    for overrides in ((), ("data.streaming=true", "trainer.max_steps=1")):
        examples = made(case, *overrides)
        assert written_rows(examples.train) == [case.expected]
        assert written_rows(examples.eval) == [case.expected]


@pytest.mark.parametrize("adds", [(), ("eos",), ("bos", "eos")], ids=str)
@pytest.mark.parametrize("unit", ["file", "line"])
def test_a_document_of_several_rows_has_one_end(
    compose: Callable[..., Any], tmp_path: Path, adds: tuple[str, ...], unit: str
) -> None:
    folder = save_llama(tmp_path / "model", word_tokenizer(adds=adds))
    lines = [word.ljust(999) + "\n" for word in ("the dog", "one", "two fox")]  # a line has the length of a row
    (tmp_path / "long.txt").write_text("".join(lines))
    (tmp_path / "short.txt").write_text("say one")
    files = f"[{tmp_path / 'long.txt'},{tmp_path / 'short.txt'}]"
    overrides = ("data=text", f"data.train={files}", f"data.eval={files}", f"data.unit={unit}")
    config = compose("task=sft", "model=hub", f"model.path={folder}", *overrides)
    examples = load_examples(config, load_tokenizer(config.model))
    begin, inner = ("<begin> " if "bos" in adds else ""), (" <end>" if unit == "line" else "")
    expected = [
        f"[{begin}the dog{inner}]",
        f"[{begin}one{inner}]",
        f"[{begin}two fox <end>]",
        f"[{begin}say one <end>]",
    ]
    assert written_rows(examples.train) == expected
    assert written_rows(examples.eval) == expected
    trainer = make_trainer(prepare(config), tmp_path / "run")
    assert written_rows(trainer.train_dataset) == expected


@dataclass(frozen=True)
class Written:
    """How a template writes a turn: the role's words, the text, and the words that end the turn."""

    user: str
    assistant: str
    end: str
    after: str = ""  # words between the end and the next turn, which are no part of either
    last: str = ""  # at the conversation's end
    only_last: str = ""  # before the last turn's text
    refused: str = "false"  # conversations that the template refuses
    role_is_found: bool = True  # False: nothing tells where a turn's text ends and the next turn's role begins

    @property
    def template(self) -> str:
        return (
            f"{{%- if {self.refused} -%}}{{{{ raise_exception('refused') }}}}{{%- endif -%}}"
            "{%- for message in messages -%}"
            f"{{{{ '{self.assistant} ' if message['role'] == 'assistant' else '{self.user} ' }}}}"
            f"{{{{ '{self.only_last} ' if loop.last else '' }}}}"
            f"{{{{ message['content'] + ' {self.end} {self.after} ' }}}}"
            f"{{%- endfor -%}}{{{{ '{self.last}' }}}}"
        )

    def expected(self, silent: set[int]) -> list[tuple[str, bool]]:
        """Return (token, whether it has loss) of TALK: a silent turn's text and end have none, all others have."""
        pairs = []
        for number, turn in enumerate(TALK):
            begin = self.assistant if turn["role"] == "assistant" else self.user
            begin += f" {self.only_last}" if number == len(TALK) - 1 else ""
            pairs += [(begin, self.role_is_found or number - 1 not in silent)]
            pairs += [(f"{turn['content']} {self.end}", number not in silent), (self.after, True)]
        # A special token that follows the last turn is its end, because only this token stops the model.
        pairs += [(self.last, len(TALK) - 1 not in silent)]
        return [(token, learnt) for words, learnt in pairs for token in words.split()]


TALK = [
    {"role": role, "content": text}
    for role, text in zip(["user", "assistant"] * 3, ["1 is", "one", "2", "the number two", "x", "yes no"], strict=True)
]
WAYS = {
    "a special end": Written("<user>", "<assistant>", "<end>"),
    "a special end, and more": Written("<user>", "<assistant>", "<end>", after="and"),
    "a special end, no short talks": Written("<user>", "<assistant>", "<end>", refused="messages | length < 6"),
    "a special end, the last turn has more": Written("say", "call", "<end>", only_last="be brief"),
    "an end of text": Written("say after", "call after", "and", last="<end>"),
    "an end of text, and nothing special": Written("say after", "call after", "not and"),
    "an end of text, and special roles": Written("<user>", "<assistant>", "and", last="<end>"),
    "an end of text, the last turn has more": Written("say", "call", "and", only_last="be brief", role_is_found=False),
    "an end of text, no short talks": Written(
        "say", "call", "and", last="<end>", refused="messages | length < 6", role_is_found=False
    ),
}


@pytest.mark.parametrize("silent", [{0}, {1}, {3}, {5}, {1, 3}, {3, 4}, {1, 5}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_turn_without_loss_leaves_the_loss_of_the_turns_around_it(
    made: Callable[..., Examples], tmp_path: Path, way: str, silent: set[int]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(WAYS[way].template)
    row = {"messages": [{**turn, "weight": int(number not in silent)} for number, turn in enumerate(TALK)]}
    examples = made(Case(row, "", (f"+task.args.chat_template_path={template}", "task.samples=0")))
    ids, labels = examples.train[0]["input_ids"], examples.train[0]["labels"]
    tokens = word_tokenizer().convert_ids_to_tokens(ids)
    found = list(zip(tokens, [label != -100 for label in labels], strict=True))
    assert found == WAYS[way].expected(silent)


@pytest.mark.parametrize("begin", ["", "<begin> "])
@pytest.mark.parametrize("task", ["task=dpo", "experiment=kto"])
def test_texts_of_preferences_begin_and_end_once_where_the_tokenizer_adds_both(
    task: str, begin: str, compose: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save_llama(tmp_path / "model", word_tokenizer(None, adds=("bos", "eos")))
    rows: list[dict[str, Any]] = [{"prompt": f"{begin}say one", "chosen": " one", "rejected": " two two"}] * 4
    if task == "experiment=kto":
        rows = [{"prompt": f"{begin}say one", "completion": " two" * n, "label": n < 2} for n in (1, 2, 1, 2)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    files = ("data=jsonl", f"data.train={path}", f"data.eval={path}")
    config = compose(task, "model=hub", f"model.path={folder}", *files)
    trainer = make_trainer(prepare(config), tmp_path / "run")
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        for row in dataset:
            answers = [name for name in row if name.endswith("_ids") and name != "prompt_ids"]
            assert answers
            for name in answers:
                tokens = written([*row["prompt_ids"], *row[name]], [-100] * len(row["prompt_ids"]) + row[name])
                assert re.fullmatch(r"<begin> say one \[(one|two|two two) <end>\]", tokens), (name, tokens)


LENGTHS = [1, 4, 2]  # words of the answers
ROWS = [{"prompt": "say one", "completion": " ".join(["two"] * length)} for length in LENGTHS]
# A row has 5 tokens of the prompt, the answer's words and its end.
WHOLE = [f"<user> say one <end> <assistant> [{row['completion']} <end>]" for row in ROWS]
TRAINED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "whole": ((), WHOLE),
    "cut at the end": (
        ("task.args.max_length=8",),
        [WHOLE[0], "<user> say one <end> <assistant> [two two two]", WHOLE[2]],
    ),
    "cut at the beginning": (
        ("task.args.max_length=8", "+task.args.truncation_mode=keep_end"),
        [WHOLE[0], "one <end> <assistant> [two two two two <end>]", WHOLE[2]],
    ),
    "cut into the answers": (
        ("task.args.max_length=3", "+task.args.truncation_mode=keep_end"),
        ["<assistant> [two <end>]", "two [two <end>]", "two [two <end>]"],  # nothing stands before a row's first token
    ),
    "packed": (("task.args.packing=true", "task.args.max_length=18"), WHOLE),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trainers_batches_hold_the_tokens_counted_by_hand(
    name: str, compose: Callable[..., Any], tmp_path: Path, words_folder: Path
) -> None:
    """The Trainer cuts and packs; `preview` shows its batches."""
    overrides, expected = TRAINED[name]
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    files = ("data=jsonl", f"data.train={path}", f"data.eval={path}", "trainer.use_cpu=true")
    checked = check(compose("model=hub", f"model.path={words_folder}", *files, *overrides))
    tokenizer = load_tokenizer(checked.config.model)
    shown = preview(checked, tokenizer, load_examples(checked.config, tokenizer))
    assert sorted(previewed(row) for row in shown) == sorted(expected)
