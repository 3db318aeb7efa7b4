"""Supervised fine-tuning: tokens and labels, compared with hand-made rows and with TRL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from tests.support.tiny import ASSISTANT, END, USER, ids_of, masked, write_jsonl

Made = Callable[..., Examples]

PAIRS = [{"prompt": f"say {number}", "completion": f" the number {number}"} for number in range(4)]
TURNS = [
    {"role": "user", "content": "say 1"},
    {"role": "assistant", "content": "the number 1"},
    {"role": "user", "content": "and after"},
    {"role": "assistant", "content": "the number 2"},
]
SHARED = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TURNS]


@pytest.fixture
def made(compose: Callable[..., Any], tmp_path: Path) -> Made:
    """Return a function from a model's folder and rows to the task's examples."""

    def make(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Examples:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        config = compose(
            "model=hub", f"model.path={folder}", "data=jsonl", f"data.train={path}", f"data.eval={path}", *overrides
        )
        return load_examples(config, load_tokenizer(config.model))

    return make


def user(tokenizer: Any, text: str) -> list[int]:
    return ids_of(tokenizer, USER, text, END)


def test_without_a_template_the_completion_and_its_end_carry_loss(made: Made, plain_llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain_llama_folder)
    row = made(plain_llama_folder, PAIRS).train[3]
    prompt, completion = ids_of(tokenizer, "say 3"), ids_of(tokenizer, " the number 3", END)
    assert row == {"input_ids": prompt + completion, "labels": masked(prompt) + completion}


def test_prompts_carry_loss_if_configured(made: Made, plain_llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain_llama_folder)
    row = made(plain_llama_folder, PAIRS, "task.args.completion_only_loss=false").train[0]
    ids = ids_of(tokenizer, "say 0", " the number 0", END)
    assert row == {"input_ids": ids, "labels": ids}


def test_an_existing_end_is_not_doubled(made: Made, plain_llama_folder: Path) -> None:
    rows = [{"prompt": "say", "completion": f" one{END}"}]
    ids = made(plain_llama_folder, rows).train[0]["input_ids"]
    assert ids == ids_of(AutoTokenizer.from_pretrained(plain_llama_folder), "say", " one", END)


@pytest.mark.parametrize("listed", [False, True], ids=["strings", "messages"])
def test_with_a_template_the_assistants_answer_carries_loss(made: Made, llama_folder: Path, listed: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    rows: list[dict[str, Any]] = [{"prompt": "say 1", "completion": "the number 1"}]
    if listed:
        rows = [{"prompt": TURNS[:1], "completion": TURNS[1:2]}]
    row = made(llama_folder, rows).train[0]
    prompt = user(tokenizer, "say 1") + ids_of(tokenizer, ASSISTANT)
    answer = ids_of(tokenizer, "the number 1", END)
    assert row == {"input_ids": prompt + answer, "labels": masked(prompt) + answer}


def test_a_template_can_be_left_out(made: Made, llama_folder: Path) -> None:
    row = made(llama_folder, PAIRS, "task.chat=false").train[0]
    assert row["input_ids"] == ids_of(AutoTokenizer.from_pretrained(llama_folder), "say 0", " the number 0", END)


@pytest.mark.parametrize(
    ("column", "turns"), [("messages", TURNS), ("conversations", SHARED)], ids=["role/content", "from/value"]
)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_conversations_carry_loss_everywhere_or_in_the_assistants_turns(
    made: Made, llama_folder: Path, column: str, turns: list[dict[str, str]], assistant_only: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    examples = made(llama_folder, [{column: turns}], f"task.args.assistant_only_loss={str(assistant_only).lower()}")
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in (("say 1", "the number 1"), ("and after", "the number 2")):
        unlearnt = user(tokenizer, question) + ids_of(tokenizer, ASSISTANT)
        learnt = ids_of(tokenizer, answer, END)
        ids += unlearnt + learnt
        labels += (masked(unlearnt) if assistant_only else unlearnt) + learnt
    assert examples.train[0]["input_ids"] == ids
    assert examples.train[0]["labels"] == labels


def test_plain_text_carries_loss_everywhere_and_gets_no_template(made: Made, llama_folder: Path) -> None:
    row = made(llama_folder, [{"body": "the quick fox"}], "data.text_column=body").train[0]
    ids = ids_of(AutoTokenizer.from_pretrained(llama_folder), "the quick fox", END)
    assert row == {"input_ids": ids, "labels": ids}


SHAPES: dict[str, tuple[list[dict[str, Any]], list[str], dict[str, Any]]] = {
    "pairs": (PAIRS, ["task.chat=false"], {}),
    "pairs, loss everywhere": (PAIRS, ["task.chat=false", "task.args.completion_only_loss=false"], {}),
    "pairs that merge": ([{"prompt": "the qu", "completion": "ick fox"}], ["task.chat=false"], {}),
    "turns": ([{"prompt": TURNS[:3], "completion": TURNS[3:]}], [], {}),
    "turns of the assistant": (
        [{"prompt": TURNS[:3], "completion": TURNS[3:]}],
        ["task.args.assistant_only_loss=true"],
        {"assistant_only_loss": True},
    ),
    "assistant, prompts too": (
        [{"prompt": TURNS[:3], "completion": TURNS[3:]}],
        ["task.args.assistant_only_loss=true", "task.args.completion_only_loss=false"],
        {"assistant_only_loss": True, "completion_only_loss": False},
    ),
    "conversations": ([{"messages": TURNS}], [], {}),
    "assistant only": (
        [{"messages": TURNS}],
        ["task.args.assistant_only_loss=true"],
        {"assistant_only_loss": True},
    ),
    "text": ([{"text": "the lazy dog"}], [], {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_labels_equal_those_of_trl(made: Made, llama_folder: Path, tmp_path: Path, shape: str) -> None:
    rows, overrides, arguments = SHAPES[shape]
    if "task.args.completion_only_loss=false" in overrides:
        arguments = {**arguments, "completion_only_loss": False}
    ours = made(llama_folder, rows, *overrides).train
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(llama_folder),
        SFTConfig(tmp_path / "out", bf16=False, use_cpu=True, report_to="none", **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(llama_folder),
    )
    for column in ("input_ids", "labels"):
        assert list(ours[column]) == list(trainer.train_dataset[column])


def test_notes_count_rows_that_are_cut_and_rows_that_are_left_out(made: Made, llama_folder: Path) -> None:
    rows = [*PAIRS, {"prompt": "say 1", "completion": " 1" * 20}, {"prompt": " 1" * 20, "completion": "two"}]
    notes = "\n".join(made(llama_folder, rows, "task.args.max_length=12").notes)
    assert "2 of 6 train rows are longer than 12 tokens" in notes
    assert "1 of these have no token left to learn" in notes


def test_rows_whose_prompt_and_completion_share_a_token_are_counted(made: Made, plain_llama_folder: Path) -> None:
    rows = [*PAIRS, {"prompt": "the qu", "completion": "ick fox"}]
    assert any(
        "1 of 5 train rows" in note and "are in one token" in note for note in made(plain_llama_folder, rows).notes
    )


def test_no_row_left_to_learn_is_an_error(made: Made, llama_folder: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"task\.args\.max_length: after cutting to 3 tokens, no"):
        made(llama_folder, PAIRS, "task.args.max_length=3")


def test_a_template_without_marks_is_an_error_for_loss_on_the_assistant_alone(
    made: Made, unmarked_llama_folder: Path
) -> None:
    with pytest.raises(ConfigErrors, match=r"doesn't mark the assistant's turns.*generation"):
        made(unmarked_llama_folder, [{"messages": TURNS}], "task.args.assistant_only_loss=true")


def test_trls_marked_version_of_a_known_template_is_used_and_noted(
    made: Made, unmarked_llama_folder: Path, tmp_path: Path
) -> None:
    template = tmp_path / "qwen.jinja"
    template.write_text(qwen2_5_chat_template, encoding="utf-8")
    examples = made(
        unmarked_llama_folder,
        [{"messages": TURNS}],
        "task.args.assistant_only_loss=true",
        f"+task.args.chat_template_path={template}",
    )
    assert any("TRL's training version" in note for note in examples.notes)
    tokenizer = AutoTokenizer.from_pretrained(unmarked_llama_folder)
    learnt = tokenizer.decode([label for label in examples.train[0]["labels"] if label != -100])
    assert "the number 1" in learnt
    assert "the number 2" in learnt
    assert "say 1" not in learnt


def test_rows_that_fit_two_shapes_are_an_error(made: Made, llama_folder: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "text": "c"}]
    with pytest.raises(ConfigErrors, match=r"prompt and completion or as text.*data\.text_column=null"):
        made(llama_folder, rows)
    assert made(llama_folder, rows, "data.text_column=null").train.num_rows == 1


def test_samples_end_before_the_last_answer(made: Made, llama_folder: Path) -> None:
    examples = made(llama_folder, [{"messages": TURNS}], "task.samples=1")
    assert examples.prompts == ("and after",)
    assert examples.references == ("the number 2",)
    assert examples.rendered[0].endswith(f"{USER}and after{END}{ASSISTANT}")


def test_packed_rows_do_not_see_each_other(made: Made, llama_folder: Path, tmp_path: Path) -> None:
    """Compare the loss of packed rows with the token-weighted loss of the single rows."""
    examples = made(llama_folder, [*PAIRS, {"prompt": "what is the lazy dog", "completion": " fox" * 9}])
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)

    def loss(packing: bool) -> tuple[float, int]:
        arguments = SFTConfig(
            tmp_path / "out", bf16=False, use_cpu=True, report_to="none", packing=packing, max_length=64
        )
        model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
        trainer = SFTTrainer(model, arguments, train_dataset=examples.train, processing_class=tokenizer)
        total, count = 0.0, 0
        for batch in trainer.get_train_dataloader():
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            with torch.no_grad():
                total += trainer.compute_loss(model, dict(batch)).item() * tokens
            count += tokens
        return total / count, count

    (packed, packed_tokens), (alone, tokens) = loss(True), loss(False)
    assert packed_tokens == tokens
    assert packed == pytest.approx(alone, rel=1e-5)
