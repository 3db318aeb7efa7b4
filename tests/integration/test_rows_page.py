"""Each example of docs/howto/rows.md is read as the page says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import Examples, load_examples
from tests.support.words import word_tokenizer, written_rows

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "howto" / "rows.md").read_text(encoding="utf-8")
# A paragraph, which may name overrides, then the rows, then what the model sees of them.
EXAMPLES = re.findall(r"\n\n((?:(?!```|\n\n).)+?)\n\n```json\n(.*?)```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)


def seen(examples: Examples, task: str) -> Iterator[str]:
    """Yield the training rows as the page shows them."""
    tokenizer = word_tokenizer()
    for row in examples.train:
        if "input_ids" in row and task == "classification":
            yield f"{tokenizer.decode(row['input_ids'])} -> {label_of(row['labels'], examples.model_arguments)}"
            continue
        if "input_ids" in row:
            yield written_rows([row])[0]
            continue
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for name in ("completion", "chosen", "rejected"):
            if name in row:
                answer = " ".join(turn["content"] for turn in row[name])
                yield f"{prompt}[{answer} <end>]" + (f" {str(row['label']).lower()}" if "label" in row else "")


def label_of(label: Any, arguments: dict[str, Any]) -> str:
    names = arguments.get("id2label")
    if isinstance(label, list):
        return ", ".join(names[number] for number, value in enumerate(label) if value)  # type: ignore[index]
    return str(names[label]) if names else f"{label:g}"


@pytest.mark.parametrize(("sentence", "rows", "shown"), EXAMPLES, ids=[f"{n}" for n in range(len(EXAMPLES))])
def test_rows_are_what_the_page_shows(
    sentence: str, rows: str, shown: str, compose: Callable[..., Any], tmp_path: Path, words_folder: Path
) -> None:
    overrides = [word for code in re.findall(r"`([^`]+)`", sentence) for word in code.split() if "=" in word]
    path = tmp_path / "rows.jsonl"
    path.write_text(rows, encoding="utf-8")
    options = [each for each in overrides if each.startswith("experiment=")] + ["data=jsonl"]
    files = (f"data.train={path}", f"data.eval={path}")
    config = compose("model=hub", f"model.path={words_folder}", *options, *files, *overrides)
    examples = load_examples(config, load_tokenizer(config.model))
    task = "classification" if "task=classification" in overrides else ""
    # Kahneman-Tversky rows are shuffled.
    assert sorted(seen(examples, task)) == sorted(shown.splitlines())
    assert not any("unused" in note.lower() for note in examples.notes)


def test_the_page_has_an_example_of_each_shape() -> None:
    assert len(EXAMPLES) == PAGE.count("```json") == 18
