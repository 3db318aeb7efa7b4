"""Classification: tokens, labels and metrics for one label, several, and measured numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from omegaconf import open_dict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.job import run
from loraplus_hydra.tasks import metrics
from loraplus_hydra.tasks.classifier import ClassificationTrainer
from loraplus_hydra.tasks.examples import Examples, load_examples
from tests.support.tiny import write_jsonl

Made = Callable[..., Examples]

CARDS = [
    {"text": "the card has arrived", "label": "there"},
    {"text": "a card has not arrived", "label": "late"},
    {"text": "a payment failed", "label": "failed"},
    {"text": "the card has arrived", "label": "there"},
]


@pytest.fixture
def made(compose: Callable[..., Any], tmp_path: Path, bert_folder: Path) -> Made:
    """Return a function from rows to the task's examples."""

    def make(rows: list[dict[str, Any]], *overrides: str, held_out: list[dict[str, Any]] | None = None) -> Examples:
        train = write_jsonl(tmp_path / "rows.jsonl", rows)
        held = write_jsonl(tmp_path / "held_out.jsonl", rows if held_out is None else held_out)
        config = compose(
            "task=classification",
            "model=hub",
            f"model.path={bert_folder}",
            "data=jsonl",
            f"data.train={train}",
            f"data.eval={held}",
            *overrides,
        )
        return load_examples(config, load_tokenizer(config.model))

    return make


def words(folder: Path, *names: str) -> list[int]:
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    return [vocabulary[name] for name in names]


def test_a_text_is_between_special_tokens_and_its_label_is_its_names_index(made: Made, bert_folder: Path) -> None:
    examples = made(CARDS)
    ids = words(bert_folder, "[CLS]", "a", "card", "has", "not", "arrived", "[SEP]")
    assert examples.train[1] == {
        "input_ids": ids,
        "token_type_ids": [0] * 7,
        "attention_mask": [1] * 7,
        "labels": 1,
    }
    assert list(examples.train["labels"]) == [2, 1, 0, 2]  # failed, late, there
    assert examples.model_arguments["id2label"] == {0: "failed", 1: "late", 2: "there"}
    assert examples.model_arguments["label2id"] == {"failed": 0, "late": 1, "there": 2}


def test_token_types_separate_the_texts_of_a_pair(made: Made, bert_folder: Path) -> None:
    rows = [{"one": "say 1", "two": "the number 1", "same": number % 2} for number in range(2)]
    columns = ("data.text_column=one", "data.text_pair_column=two", "data.label_column=same")
    row = made(rows, *columns).train[0]
    assert row["input_ids"] == words(bert_folder, "[CLS]", "say", "1", "[SEP]", "the", "number", "1", "[SEP]")
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_several_labels_are_one_for_each_given_label(made: Made) -> None:
    rows = [{"text": "a", "label": ["b", "a"]}, {"text": "the", "label": []}, {"text": "a", "label": ["c"]}]
    examples = made(rows, "task.metric=eval_f1")
    assert list(examples.train["labels"]) == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert examples.model_arguments["problem_type"] == "multi_label_classification"


def test_a_measured_number_is_its_own_label(made: Made) -> None:
    rows = [{"text": "a", "label": 2.5}, {"text": "the", "label": 3}]
    examples = made(rows, "task.metric=eval_pearson")
    assert list(examples.train["labels"]) == [2.5, 3.0]
    assert examples.model_arguments["num_labels"] == 1
    assert examples.model_arguments["problem_type"] == "regression"


def test_whole_numbers_are_labels_in_numerical_order(made: Made) -> None:
    rows = [{"text": "a", "label": number} for number in (10, 9, 2, 10)]
    assert made(rows).model_arguments["id2label"] == {0: "2", 1: "9", 2: "10"}


def test_a_long_text_is_cut_between_its_special_tokens_and_counted(made: Made, bert_folder: Path) -> None:
    examples = made([*CARDS, {"text": "the lazy dog " * 20, "label": "late"}], "task.max_length=8")
    ids = examples.train[4]["input_ids"]
    assert len(ids) == 8
    assert ids[-1] == words(bert_folder, "[SEP]")[0]
    assert any("1 of 5 train rows are longer than 8 tokens" in note for note in examples.notes)


def test_a_metric_that_these_labels_do_not_have_is_an_error(made: Made) -> None:
    with pytest.raises(ConfigErrors, match=r"task\.metric: regression has no 'eval_accuracy'.*eval_pearson"):
        made([{"text": "a", "label": 0.5}, {"text": "a", "label": 1.5}])


def test_a_metric_that_points_the_wrong_way_is_an_error(made: Made) -> None:
    with pytest.raises(ConfigErrors, match=r"task\.greater_is_better: of eval_loss less is better"):
        made(CARDS, "task.metric=eval_loss")


def test_labels_outside_a_sample_of_the_rows_are_no_error(made: Made) -> None:
    held_out = [*CARDS, {"text": "fox", "label": "fox"}]
    with pytest.raises(ConfigErrors, match="'fox', a label that no training row has"):
        made(CARDS, held_out=held_out)
    examples = made(CARDS, "data.max_samples=5", held_out=held_out)
    assert "fox" in examples.model_arguments["label2id"]


def test_the_counts_say_that_both_splits_are_the_same_rows(made: Made) -> None:
    assert made(CARDS).counts() == "4 examples for training, 4 for evaluation (the same rows)"
    assert made(CARDS, held_out=CARDS[:2]).counts() == "4 examples for training, 2 for evaluation"


def test_names_that_a_data_set_declares_keep_their_order(compose: Callable[..., Any], bert_folder: Path) -> None:
    config = compose(
        "task=classification",
        "model=hub",
        f"model.path={bert_folder}",
        "data=jsonl",
        "data._target_=tests.tasks.test_task_classification.declared_rows",
    )
    with open_dict(config):
        for name in ("train", "format", "eval", "eval_fraction", "streaming", "encoding", "seed", "max_samples"):
            del config.data[name]
    examples = load_examples(config, load_tokenizer(config.model))
    assert examples.model_arguments["id2label"] == {0: "zebra", 1: "ant"}
    assert list(examples.train["labels"]) == [0, 1]


def declared_rows() -> DatasetDict:
    """Return rows with declared label names, as a user's callable does."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    rows = Dataset.from_dict({"text": ["a", "the"], "label": [0, 1]}, features=features)
    return DatasetDict(train=rows, eval=rows)


@pytest.fixture
def from_tables(compose: Callable[..., Any], tmp_path: Path, bert_folder: Path) -> Callable[..., Examples]:
    """Return a function from the train and the eval rows, each written to a Parquet file, to the task's examples."""

    def make(train: Dataset, held_out: Dataset) -> Examples:
        train.to_parquet(str(tmp_path / "train.parquet"))
        held_out.to_parquet(str(tmp_path / "held_out.parquet"))
        files = (f"data.train={tmp_path / 'train.parquet'}", f"data.eval={tmp_path / 'held_out.parquet'}")
        config = compose("task=classification", "model=hub", f"model.path={bert_folder}", "data=parquet", *files)
        return load_examples(config, load_tokenizer(config.model))

    return make


def table(*labels: Any, encoded: bool = True) -> Dataset:
    """Return a row for each label, with the names declared by `datasets` itself unless they are left as they are."""
    rows = Dataset.from_dict({"text": ["a"] * len(labels), "label": list(labels)})
    return rows.class_encode_column("label") if encoded else rows


def named(examples: Examples, split: str) -> list[str]:
    return [examples.model_arguments["id2label"][number] for number in getattr(examples, split)["labels"]]


def test_each_split_has_its_own_declared_names(from_tables: Callable[..., Examples]) -> None:
    examples = from_tables(table("bad", "good", "neutral"), table("good", "neutral"))
    assert named(examples, "train") == ["bad", "good", "neutral"]
    assert named(examples, "eval") == ["good", "neutral"]


def test_a_split_may_declare_its_names_where_the_other_has_them_in_its_rows(
    from_tables: Callable[..., Examples],
) -> None:
    examples = from_tables(table("bad", "good", "neutral"), table("neutral", "good", encoded=False))
    assert named(examples, "eval") == ["neutral", "good"]
    examples = from_tables(table(7, 3, 5, encoded=False), table("5", "7"))
    assert named(examples, "train") == ["7", "3", "5"]
    assert named(examples, "eval") == ["5", "7"]


def test_a_label_whose_only_row_is_held_out_is_no_error(
    compose: Callable[..., Any], bert_folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"say {number}", "label": f"l{number}"} for number in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = ("model=hub", f"model.path={bert_folder}", "task=classification", "data=jsonl", f"data.train={path}")
    for seed in (1, 2):
        config = compose(*model, "data.eval_fraction=0.5", f"data.seed={seed}")
        examples = load_examples(config, load_tokenizer(config.model))
        assert list(examples.model_arguments["label2id"]) == [f"l{number}" for number in range(8)]


def test_a_name_that_only_the_eval_rows_declare_is_an_error(from_tables: Callable[..., Examples]) -> None:
    with pytest.raises(ConfigErrors, match="'bad', a label that no training row has; the labels are good, neutral"):
        from_tables(table("good", "neutral"), table("bad", "good"))


def test_several_labels_have_the_names_of_their_split(from_tables: Callable[..., Examples]) -> None:
    def listed(names: list[str], *labels: list[int]) -> Dataset:
        features = Features({"text": Value("string"), "label": List(ClassLabel(names=names))})
        return Dataset.from_dict({"text": ["a"] * len(labels), "label": list(labels)}, features=features)

    examples = from_tables(listed(["a", "b", "c"], [0, 1], [2], []), listed(["c", "a"], [0], [1, 0]))
    assert list(examples.eval["labels"]) == [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]


@pytest.mark.parametrize("encoded", [(True, False), (False, True)])
def test_numbers_in_one_split_and_names_in_the_other_are_an_error(
    from_tables: Callable[..., Examples], encoded: tuple[bool, bool]
) -> None:
    splits = [table("bad", "good") if each else table(0, 1, encoded=False) for each in encoded]
    expected = (
        r"data\.label_column: the (eval|train) rows have the numbers 0, 1, but the (eval|train) rows have the names "
        r"bad, good; replace the numbers in 'label' with their names"
    )
    with pytest.raises(ConfigErrors, match=expected):
        from_tables(*splits)


def test_rows_are_cut_anew_on_another_side(made: Made, bert_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "the lazy dog has arrived", "label": number} for number in range(2)]

    def kept(side: str) -> list[int]:
        tokenizer = AutoTokenizer.from_pretrained(bert_folder, truncation_side=side)
        tokenizer.save_pretrained(tmp_path / side)
        return made(rows, "task.max_length=4", f"model.tokenizer={tmp_path / side}").train[0]["input_ids"]

    assert kept("right") == words(bert_folder, "[CLS]", "the", "lazy", "[SEP]")
    assert kept("left") == words(bert_folder, "[CLS]", "has", "arrived", "[SEP]")


def evaluated(predictions: Any, labels: Any) -> Any:
    return SimpleNamespace(predictions=np.array(predictions), label_ids=np.array(labels))


def test_metrics_of_one_label_equal_those_counted_by_hand() -> None:
    # Predicted 1 1 0 0 1, true 1 0 0 1 1: true positives 2, false 1, missed 1, true negatives 1.
    found = metrics.single_label(evaluated([[0, 1], [0, 1], [1, 0], [1, 0], [0, 1]], [1, 0, 0, 1, 1]))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


def test_metrics_of_several_labels_equal_those_counted_by_hand() -> None:
    found = metrics.multi_label(evaluated([[1, -1], [1, 1], [-1, -1]], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_metrics_of_measured_numbers_equal_those_counted_by_hand() -> None:
    predictions, labels = [[1.0], [2.0], [4.0]], [1.0, 3.0, 3.5]
    found = metrics.regression(evaluated(predictions, labels))
    x, y = np.array([1.0, 2.0, 4.0]), np.array(labels)
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    assert found["pearson"] == pytest.approx(covariance / (x.std() * y.std()))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mae"] == pytest.approx(0.5)
    assert found["mse"] == pytest.approx((0 + 1 + 0.25) / 3)
    assert metrics.regression(evaluated([[1.0], [1.0]], [1.0, 2.0]))["pearson"] == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_do_not_change_with_accumulation(
    smoothing: float, made: Made, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare four accumulated batches of one row with one batch of four."""
    examples = made(CARDS)

    def gradient(batch: int, accumulated: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=3).eval()
        monkeypatch.setattr(model, "train", lambda: model)  # no dropout
        arguments = TrainingArguments(
            tmp_path / "out",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            max_grad_norm=0,
            learning_rate=1.0,
            optim="sgd",
            label_smoothing_factor=smoothing,
            use_cpu=True,
            report_to="none",
        )
        before = model.classifier.weight.detach().clone()
        trainer = ClassificationTrainer(model, arguments, train_dataset=examples.train, **examples.trainer_arguments)
        trainer.train()
        return before - model.classifier.weight.detach()

    torch.testing.assert_close(gradient(1, 4), gradient(4, 1), rtol=1e-4, atol=1e-7)


def test_the_head_is_trained_saved_and_named(compose: Callable[..., Any], bert_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", CARDS)
    config = compose(
        "task=classification",
        "model=hub",
        f"model.path={bert_folder}",
        "data=jsonl",
        f"data.train={path}",
        f"data.eval={path}",
        "trainer.max_steps=2",
    )
    result = run(config, tmp_path / "run")
    assert result.metric == "eval_accuracy"
    assert 0 <= result.value <= 1
    assert result.best["value"] >= result.metrics["eval_accuracy"]
    assert {"eval_f1", "eval_matthews"} <= set(result.metrics)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.classifier.weight"].shape == (3, 16)
    groups = {row["name"]: row for row in json.loads((tmp_path / "run" / "param_groups.json").read_text())}
    head = {row["role"]: row for name, row in groups.items() if "classifier" in name}
    assert head["saved_module"]["lr"] == head["bias"]["lr"] == config.loraplus.lr_head
