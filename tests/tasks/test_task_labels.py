"""A trained head keeps its labels: rows are mapped to them by name, in training and in an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.evaluate import evaluate_on
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.job import run
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.training.prepare import load_adapted_model, prepare_examples
from tests.support.tiny import write_jsonl

NAMES = ("zebra", "Late", "failed")  # in no alphabetical order
TEXTS = ("the card has arrived", "a card has not arrived", "a payment failed", "the lazy dog", "say 1", "say 2")


@pytest.fixture(scope="module")
def classifier(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT whose head has three named outputs."""
    folder = tmp_path_factory.mktemp("classifier")
    names = dict(enumerate(NAMES))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        bert_folder, id2label=names, label2id={name: number for number, name in names.items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    with torch.no_grad():  # without its mean, a text's answer is not that of all others
        logits = model.eval()(**tokenizer(list(TEXTS), padding=True, return_tensors="pt")).logits
        model.classifier.bias.sub_(logits.mean(0))
        for parameter in model.classifier.parameters():
            parameter.mul_(100)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def configured(compose: Callable[..., Any], tmp_path: Path, classifier: Path) -> Callable[..., Any]:
    """A config for rows, which are evaluated on too."""

    def make(rows: list[dict[str, Any]], *overrides: str) -> Any:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        files = ("data=jsonl", f"data.train={path}", f"data.eval={path}", "trainer.max_steps=1")
        return compose("task=classification", "model=hub", f"model.path={classifier}", *files, *overrides)

    return make


def made(config: Any) -> Examples:
    return prepare_examples(config, load_tokenizer(config.model))


def own_answers(folder: Path) -> list[str]:
    """The labels that plain transformers gives TEXTS."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return [NAMES[int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())] for text in TEXTS]


def test_rows_get_the_numbers_of_the_trained_heads_names(configured: Callable[..., Any]) -> None:
    rows = [{"text": "a", "label": name} for name in ("failed", "zebra", "LATE", "late")]
    examples = made(configured(rows))
    assert list(examples.train["labels"]) == [2, 0, 1, 1]
    assert examples.model_arguments["id2label"] == dict(enumerate(NAMES))


def test_rows_with_some_of_the_labels_keep_the_whole_head(configured: Callable[..., Any]) -> None:
    assert made(configured([{"text": "a", "label": "failed"}])).model_arguments["num_labels"] == 3


def test_labels_that_the_head_lacks_are_listed(configured: Callable[..., Any]) -> None:
    rows = [{"text": "a", "label": name} for name in ("early", "failed", "ant")]
    with pytest.raises(
        ConfigErrors, match=r"trained head doesn't have: ant, early; the head's labels are zebra, Late, failed"
    ):
        made(configured(rows))


def test_a_new_head_has_the_rows_labels_and_other_weights(configured: Callable[..., Any], classifier: Path) -> None:
    rows = [{"text": "a", "label": name} for name in ("early", "failed", "ant")]
    config = configured(rows, "task.new_head=true")
    examples = made(config)
    assert list(examples.train["labels"]) == [1, 2, 0]
    model = load_adapted_model(config, load_tokenizer(config.model), examples)
    old = AutoModelForSequenceClassification.from_pretrained(classifier).classifier.weight
    new = model.get_base_model().classifier.modules_to_save["default"].weight
    assert new.std() < old.std() / 10


def test_the_metrics_before_training_are_those_of_the_model_itself(
    configured: Callable[..., Any], classifier: Path, tmp_path: Path
) -> None:
    answers = own_answers(classifier)
    assert len(set(answers)) > 1
    rows = [{"text": text, "label": answer} for text, answer in zip(TEXTS, answers, strict=True)]
    result = run(configured(rows, "optimizer.lr=1e-9"), tmp_path / "run")
    assert result.metrics["eval_accuracy"] == 1.0


def test_an_evaluation_goes_by_the_runs_labels_and_needs_no_training_rows(
    configured: Callable[..., Any], classifier: Path, tmp_path: Path
) -> None:
    run(configured([{"text": "a", "label": name} for name in NAMES], "optimizer.lr=1e-9"), tmp_path / "run")
    answers = own_answers(classifier)
    rows = [{"text": text, "label": answer} for text, answer in zip(TEXTS, answers, strict=True)]
    rows += [{"text": TEXTS[0], "label": next(name for name in NAMES if name != answers[0])}]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    metrics = evaluate_on(open_run(str(tmp_path / "run")), {"eval": str(other)})
    assert metrics["eval_accuracy"] == pytest.approx(6 / 7)
    write_jsonl(other, [*rows, {"text": "a", "label": "ant"}])
    with pytest.raises(ConfigErrors, match="labels that the run doesn't have: ant"):
        evaluate_on(open_run(str(tmp_path / "run")), {"eval": str(other)})


def test_an_adapter_with_a_head_goes_on_with_its_labels(
    configured: Callable[..., Any], bert_folder: Path, tmp_path: Path
) -> None:
    first = configured([{"text": "a", "label": name} for name in ("b", "c")], f"model.path={bert_folder}")
    run(first, tmp_path / "run")
    further = ("adapter=existing", f"adapter.path={tmp_path / 'run'}", f"model.path={bert_folder}")
    assert list(made(configured([{"text": "a", "label": "c"}], *further)).train["labels"]) == [1]
    with pytest.raises(ConfigErrors, match=r"the head of adapter\.path doesn't have: d; the head's labels are b, c"):
        made(configured([{"text": "a", "label": name} for name in ("c", "d")], *further))
    with pytest.raises(ConfigErrors, match=r"task\.new_head"):
        made(configured([{"text": "a", "label": "d"}], *further, "task.new_head=true"))


def test_outputs_without_names_are_mentioned(configured: Callable[..., Any], bert_folder: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "model")
    rows = [{"text": "a", "label": name} for name in ("pos", "neg")]
    notes = made(configured(rows, f"model.path={tmp_path / 'model'}")).notes
    assert any("no names for its outputs. The rows' labels name them in this order: neg, pos" in note for note in notes)
