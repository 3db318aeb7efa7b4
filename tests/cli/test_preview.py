"""`preview` shows what the Trainer's own batches hold: every token, and the loss where the labels have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.check import check
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.preview import PreviewedRow, preview
from loraplus_hydra.tasks.examples import load_examples
from tests.conftest import Finished
from tests.support.tiny import write_jsonl

TURNS = [
    {"role": "user", "content": "say 1"},
    {"role": "assistant", "content": "the number 1"},
    {"role": "user", "content": "say 2"},
    {"role": "assistant", "content": "the number 2"},
]
Previewed = Callable[..., list[PreviewedRow]]


@pytest.fixture
def previewed(compose: Callable[..., Any], tmp_path: Path) -> Previewed:
    """The previewed rows of a config."""

    def show(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> list[PreviewedRow]:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        config = compose(
            "model=hub", f"model.path={folder}", "data=jsonl", f"data.train={path}", f"data.eval={path}", *overrides
        )
        tokenizer = load_tokenizer(config.model)
        return preview(check(config), tokenizer, load_examples(config, tokenizer))

    return show


def spelt(row: PreviewedRow) -> str:
    """Tokens with | between them, those that carry loss in brackets."""
    return "|".join(f"[{token.text}]" if token.carries_loss else token.text for token in row.tokens)


HEAD, ANSWER = "<|user|>|say| 1|<|end|>|<|assistant|>|", "[the]|[ number]|[ 1]|[<|end|>]"
SECOND = "<|user|>|say| 2|<|end|>|<|assistant|>|[the]|[ number]|[ 2]|[<|end|>]"
SHAPES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "template": ({"prompt": "say 1", "completion": "the number 1"}, [], HEAD + ANSWER),
    "no template": (
        {"prompt": "say 1", "completion": " the number"},
        ["task.chat=false"],
        "say| 1|[ the]|[ number]|[<|end|>]",
    ),
    "loss on prompts": (
        {"prompt": "say 1", "completion": "\n the"},
        ["task.chat=false", "task.args.completion_only_loss=false"],
        "say|[ 1]|[\\n]|[ the]|[<|end|>]",
    ),
    "assistant only": (
        {"messages": TURNS},
        ["task.args.assistant_only_loss=true"],
        f"{HEAD}{ANSWER}|{SECOND}",
    ),
    "conversation": (
        {"messages": TURNS[:2]},
        [],
        "<|user|>|[say]|[ 1]|[<|end|>]|[<|assistant|>]|" + ANSWER,
    ),
    "cut": ({"prompt": "say 1", "completion": "the number 1"}, ["task.args.max_length=7"], HEAD + "[the]|[ number]"),
    "text": ({"text": "the lazy dog"}, ["task=text", "task.block_size=4"], "the|[ lazy]|[ dog]|[<|end|>]"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_with_loss_are_those_of_the_labels(previewed: Previewed, llama_folder: Path, name: str) -> None:
    row, overrides, expected = SHAPES[name]
    shown = previewed(llama_folder, [row] * 2, *overrides)
    assert [spelt(one) for one in shown] == [expected] * 2


def test_padding_is_left_out(previewed: Previewed, llama_folder: Path) -> None:
    rows = [{"prompt": "say 1", "completion": "the number 1"}, {"prompt": "say 1", "completion": "the number 1 2 3 4"}]
    assert {len(row.tokens) for row in previewed(llama_folder, rows)} == {9, 12}


def test_packed_rows_are_shown_apart(previewed: Previewed, llama_folder: Path) -> None:
    rows = [{"prompt": "say 1", "completion": f"the number {number}"} for number in range(5)]
    shown = previewed(llama_folder, rows, "task.args.packing=true", "task.args.max_length=64")
    assert {spelt(row) for row in shown} <= {HEAD + ANSWER.replace("1", str(number)) for number in range(5)}
    assert len(shown) == 3


@pytest.mark.parametrize(
    ("label", "overrides", "expected"),
    [
        ("late", [], "late (0)"),
        (["late", "lost"], ["task.metric=eval_f1"], "late, lost"),
        (2.5, ["task.metric=eval_mse", "task.greater_is_better=false"], "2.5"),
    ],
)
def test_classified_rows_show_their_label(
    previewed: Previewed, bert_folder: Path, label: Any, overrides: list[str], expected: str
) -> None:
    rows = [{"text": "a card", "label": label}, {"text": "a card", "label": "there" if label == "late" else label}]
    shown = previewed(bert_folder, rows, "task=classification", *overrides)
    assert "|".join(token.text for token in shown[0].tokens) == "[CLS]|a|card|[SEP]"
    assert not any(token.carries_loss for token in shown[0].tokens)
    assert expected in {row.label for row in shown}


def test_streamed_rows_are_shown(previewed: Previewed, llama_folder: Path) -> None:
    rows = [{"prompt": "say 1", "completion": "the number 1"}] * 4
    shown = previewed(llama_folder, rows, "data.streaming=true", "trainer.max_steps=2")
    assert [spelt(row) for row in shown] == [HEAD + ANSWER] * 3


def test_preferences_show_both_answers_behind_the_same_prompt(previewed: Previewed, llama_folder: Path) -> None:
    rows = [{"prompt": "say 1", "chosen": "the number 1", "rejected": "fox"}] * 4
    shown = previewed(llama_folder, rows, "task=dpo")
    assert [row.side for row in shown] == ["chosen", "rejected"] * 3
    assert spelt(shown[0]) == HEAD + ANSWER
    assert spelt(shown[1]).startswith(HEAD + "[")
    assert spelt(shown[1]).endswith("[<|end|>]")


def test_command_prints_three_rows_and_leaves_nothing(
    cli: Callable[..., Finished], llama_folder: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    rows = [{"prompt": "say 1", "completion": "the number 1"} for _ in range(5)]
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    finished = cli("preview", "model=hub", f"model.path={llama_folder}", "data=jsonl", f"data.train={path}")
    assert finished.status == 0
    lines = finished.out.splitlines()
    assert "4 examples for training, 1 for evaluation" in lines
    assert lines.count(HEAD + ANSWER) == 3
    assert "Row 3: 9 tokens, 4 have loss" in lines
    assert list(tmp_path.iterdir()) == []


def test_colour_stands_for_brackets_on_a_terminal() -> None:
    from loraplus_hydra.runs.preview import Token, render

    row = PreviewedRow((Token("a", False), Token("b", True)))
    coloured = render(row, coloured=True)
    assert coloured.plain == "a|b"
    assert any(span.start == 2 and "green" in str(span.style) for span in coloured.spans)
    assert render(row, coloured=False).plain == "a|[b]"
