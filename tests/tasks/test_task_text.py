"""Continuation of plain text: blocks that lose no token and mark where documents end."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.job import run
from loraplus_hydra.tasks.examples import Examples, load_examples
from loraplus_hydra.tasks.text import cut_into_blocks, pieces
from tests.support.tiny import END, ids_of, save_llama, write_jsonl
from tests.support.words import word_tokenizer, written

Made = Callable[..., Examples]


@pytest.fixture
def made(compose: Callable[..., Any], llama_folder: Path) -> Made:
    """Return a function from overrides to the text task's examples."""

    def make(*overrides: str) -> Examples:
        config = compose("task=text", "model=hub", f"model.path={llama_folder}", *overrides)
        return load_examples(config, load_tokenizer(config.model))

    return make


def tokens(blocks: Any) -> list[int]:
    return [token for block in blocks["input_ids"] for token in block]


def test_documents_that_begin_and_end_themselves_do_so_once(compose: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", word_tokenizer(adds=("bos",)))
    texts = ("<begin> the dog <end>", "one", " <end>")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    overrides = ("data=jsonl", f"data.train={rows}", f"data.eval={rows}", "task.block_size=32")
    config = compose("task=text", "model=hub", f"model.path={folder}", *overrides)
    (block,) = load_examples(config, load_tokenizer(config.model)).train
    assert written(block["input_ids"], block["labels"]) == "[<begin> the dog <end> <begin> one <end> <begin> <end>]"


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=8), st.integers(1, 7))
def test_blocks_are_the_text_in_order_and_only_the_last_is_shorter(parts: list[list[int]], size: int) -> None:
    blocks = [block.tolist() for block in cut_into_blocks((np.array(part, dtype=np.int32) for part in parts), size)]
    assert list(chain.from_iterable(blocks)) == list(chain.from_iterable(parts))
    assert all(len(block) == size for block in blocks[:-1])
    assert all(0 < len(block) <= size for block in blocks[-1:])


def test_documents_follow_each_other_with_an_end_after_each(made: Made, llama_folder: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the lazy dog"}, {"text": "say 1 2 3"}])
    examples = made("data=jsonl", f"data.train={rows}", f"data.eval={rows}", "task.block_size=5")
    ids = ids_of(AutoTokenizer.from_pretrained(llama_folder), "the lazy dog", END, "say 1 2 3", END)
    blocks = list(examples.train)
    assert [block["input_ids"] for block in blocks] == [ids[:5], ids[5:]]
    assert all(block["labels"] == block["input_ids"] for block in blocks)


def test_a_file_is_one_document_whose_end_is_held_out(made: Made, llama_folder: Path, tmp_path: Path) -> None:
    text = "\n".join(f"say {number} the quick brown fox" for number in range(300))
    (tmp_path / "book.txt").write_text(text)
    examples = made("data=text", f"data.train={tmp_path / 'book.txt'}", "data.eval_fraction=0.3", "task.block_size=64")
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    train, held_out = tokens(examples.train), tokens(examples.eval)
    assert held_out[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in train + held_out[:-1]
    assert tokenizer.decode(train) + tokenizer.decode(held_out[:-1]) == text
    assert 0.2 < len(held_out) / (len(train) + len(held_out)) < 0.4


def document(path: Path, words: str) -> str:
    """Write a file whose rows are these words: each line has the length of a row, and becomes one token."""
    path.write_text("".join(word.ljust(999) + "\n" for word in words.split()))
    return str(path)


# The kept rows of each file, as written by `written`. An end that is not a document's own end has no loss.
CUT: dict[str, tuple[str, str, str]] = {
    "the end of each file is held out": (
        "data.train=[A,B] data.eval_fraction=0.25",
        "[<begin> one two three] <end> [<begin> dog fox yes]",
        "[say <end> no <end>]",
    ),
    "rows are drawn by weights": (
        "data.train={A:1,B:2} data.eval=C",
        "[<begin> one two] <end> [<begin> dog fox yes no <end>]",
        "[<begin> dog fox yes no <end>]",
    ),
    "rows are held out and drawn": (
        "data.train={A:1,B:2} data.eval_fraction=0.5",
        "[<begin> one] <end> [<begin> dog fox]",
        "[three] <end> [yes no <end>]",
    ),
    "few rows are used": (
        "data.train=[A,B] data.eval_fraction=0.25 data.max_samples=2",
        "[<begin> one] <end> [<begin> dog]",
        "[say <end> no <end>]",
    ),
    "a document ends with a batch of rows": (
        "data.train=[LONG,B] data.eval_fraction=0.5",
        f"[<begin>{' is' * 2000}] <end> [<begin> dog fox]",
        f"[{'is ' * 2000}<end> yes no <end>]",
    ),
    "documents are streamed": (
        "data.train=[A,B] data.eval=D data.streaming=true",
        "[<begin> one two three say <end> <begin> dog fox yes no <end>]",
        "[<begin> one two three say <end>]",
    ),
}


@pytest.mark.parametrize("way", CUT)
def test_documents_that_are_cut_are_not_joined(compose: Callable[..., Any], tmp_path: Path, way: str) -> None:
    words, train, held_out = CUT[way]
    model = save_llama(tmp_path / "model", word_tokenizer(None, adds=("bos",)))
    files = {"A": "one two three say", "B": "dog fox yes no", "LONG": "is " * 4000}
    files |= {"C": files["B"], "D": files["A"]}  # for evaluation
    for name in files:
        words = re.sub(rf"\b{name}\b", document(tmp_path / f"{name.lower()}.txt", files[name]), words)
    overrides = [*words.split(), "data=text", "task=text", "task.block_size=32", f"model.path={model}"]
    config = compose("model=hub", *overrides, "trainer.max_steps=1")
    examples = load_examples(config, load_tokenizer(config.model))
    for blocks, expected in ((examples.train, train), (examples.eval, held_out)):
        ids, labels = ([token for block in blocks for token in block[name]] for name in ("input_ids", "labels"))
        assert written(ids, labels) == expected


def test_the_last_block_is_padded_without_loss_and_ends_carry_loss(made: Made, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the lazy dog"}, {"text": "say 1 2 3"}])
    examples = made("data=jsonl", f"data.train={rows}", f"data.eval={rows}", "task.block_size=6")
    first, last = examples.train
    batch = examples.trainer_arguments["data_collator"]([first, last])
    shorter = len(last["input_ids"])
    assert batch["labels"].shape == (2, 6)
    assert batch["labels"][0].tolist() == first["input_ids"]
    assert batch["labels"][1].tolist() == last["input_ids"] + [-100] * (6 - shorter)
    assert batch["attention_mask"][1].tolist() == [1] * shorter + [0] * (6 - shorter)


def test_an_end_that_is_also_the_pad_token_carries_loss(made: Made, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the lazy dog"}])
    override = f"model.pad_token='{END}'"
    examples = made("data=jsonl", f"data.train={rows}", f"data.eval={rows}", "task.block_size=8", override)
    batch = examples.trainer_arguments["data_collator"](list(examples.train))
    assert batch["labels"][0, -1].item() == batch["input_ids"][0, -1].item() != -100


def test_evaluation_loss_is_the_mean_over_all_tokens(
    made: Made, compose: Any, llama_folder: Path, tmp_path: Path
) -> None:
    """Compare with the loss by hand over all blocks, of which the last is shorter."""
    text = tmp_path / "book.txt"
    text.write_text("\n".join(f"say {number} the quick brown fox" for number in range(150)))
    overrides = ["data=text", f"data.train={text}", "data.eval_fraction=0.3", "task.block_size=48"]
    blocks = made(*overrides).eval
    config = compose(
        "task=text",
        "model=hub",
        f"model.path={llama_folder}",
        "trainer.max_steps=1",
        "trainer.per_device_eval_batch_size=4",
        "task.samples=0",
        *overrides,
    )
    result = run(config, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    total, count = 0.0, 0
    for block in blocks:
        ids = torch.tensor([block["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert len(blocks[-1]["input_ids"]) < 48
    assert result.metrics_before["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_blocks_beyond_the_models_context_are_an_error(made: Made, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the lazy dog\n" * 300)
    with pytest.raises(ConfigErrors, match=r"task\.block_size: 256 tokens are more than the model's maximum, 128"):
        made("data=text", f"data.train={tmp_path / 'book.txt'}")


def test_streamed_text_gives_the_same_blocks(made: Made, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"say {number} the quick brown fox\n" for number in range(300)))
    paths = [f"data.train={tmp_path / 'book.txt'}", f"data.eval={tmp_path / 'book.txt'}", "task.block_size=32"]
    whole = made("data=text", *paths).train
    streamed = made("data=text", *paths, "data.streaming=true").train
    assert [block["input_ids"] for block in streamed] == [block["input_ids"] for block in whole]


@given(st.text(alphabet="ab \n\t"), st.integers(1, 9))
def test_pieces_are_the_text_and_none_is_longer_than_twice_the_size(text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(size <= len(piece) <= 2 * size for piece in found[:-1])
    assert len(found[-1]) <= 2 * size


def test_a_text_that_is_long_in_one_cell_is_cut_before_it_is_tokenised(
    made: Made, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the fox jumps over\none dog, two dogs " * 40
    path = write_jsonl(tmp_path / "cell.jsonl", [{"text": text}, {"text": "the dog"}])
    tokenised: list[str] = []
    call = PreTrainedTokenizerFast.__call__

    def noted(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        tokenised.extend([text] if isinstance(text, str) else text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", noted)
    monkeypatch.setattr("loraplus_hydra.tasks.text._LONG", 64)
    examples = made("data=jsonl", f"data.train={path}", f"data.eval={path}", "task.block_size=64")
    assert 64 < max(map(len, tokenised)) <= 128
    monkeypatch.undo()
    assert tokens(examples.train) == ids_of(AutoTokenizer.from_pretrained(llama_folder), text, END, "the dog", END)
