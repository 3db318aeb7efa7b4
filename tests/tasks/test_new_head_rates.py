"""The rate of a new head in runs: it is what `inspect` prints, a resume keeps it, and a trained head has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraplus_hydra.check import check
from loraplus_hydra.runs.evaluate import evaluate_on
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.job import run
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.prepare import prepare
from tests.conftest import Finished
from tests.runs.conftest import AUTO
from tests.support.forking import differences
from tests.support.tiny import write_jsonl

HEAD = {"weight": ("head", "new_head", 0.02, 0.1), "bias": ("head_no_decay", "new_head_no_decay", 0.02, 0.0)}
TRAINED = {"weight": ("groupA", "groupA", 1e-3, 0.1), "bias": ("groupB_no_decay", "groupB_no_decay", 8e-3, 0.0)}
LABELS: dict[str, list[Any]] = {
    "single_label_classification": ["a", "b", "c"],
    "multi_label_classification": [["a"], ["b", "c"], []],
    "regression": [0.5, 1.5, 2.5],
}
METRICS = dict(zip(LABELS, ("eval_accuracy", "eval_f1", "eval_pearson"), strict=True))


@pytest.fixture
def words(tmp_path: Path, bert_folder: Path) -> Callable[..., list[str]]:
    """Return overrides of a run that classifies a few rows; the model has no head."""

    def made(*overrides: str, labels: str = "single_label_classification") -> list[str]:
        rows = [{"text": f"say {number}", "label": LABELS[labels][number % 3]} for number in range(9)]
        path = write_jsonl(tmp_path / f"{labels}.jsonl", rows)
        task = ["task=classification", f"task.problem_type={labels}", f"task.metric={METRICS[labels]}"]
        files = ["model=hub", f"model.path={bert_folder}", "data=jsonl", f"data.train={path}", f"data.eval={path}"]
        steps = ["trainer.max_steps=4", "trainer.save_steps=1", "trainer.per_device_train_batch_size=2"]
        rates = ["optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "loraplus.lr_head=0.02"]
        return [*task, *files, *steps, *rates, *overrides]

    return made


@pytest.fixture
def classifier(tmp_path: Path, bert_folder: Path) -> Path:
    """A folder with a BERT whose head has three outputs, a, b and c."""
    names = dict(enumerate("abc"))
    model = AutoModelForSequenceClassification.from_pretrained(
        bert_folder, id2label=names, label2id={name: number for number, name in names.items()}
    )
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def head_of(entries: list[dict[str, Any]]) -> dict[str, tuple[str, str, float, float]]:
    """End of the name -> rule, group, rate and decay of each tensor of the head."""
    return {
        each["name"].rpartition(".")[2]: (each["rule"], each["group"], each["lr"], each["weight_decay"])
        for each in entries
        if ".classifier." in each["name"]
    }


def written(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "param_groups.json").read_text())
    return entries


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "adamw8bit"])
@pytest.mark.parametrize("labels", LABELS)
def test_inspect_the_optimizer_and_the_stored_groups_agree_on_a_new_head(
    labels: str,
    optimizer: str,
    words: Callable[..., list[str]],
    cli: Callable[..., Finished],
    compose: Callable[..., Any],
    tmp_path: Path,
) -> None:
    overrides = words(f"optimizer={optimizer}", labels=labels)
    assert head_of(json.loads(cli("inspect", "--json", *overrides).out)["tensors"]) == HEAD
    run(compose(*overrides), tmp_path / "run")
    assert head_of(written(tmp_path / "run")) == HEAD
    built = make_trainer(prepare(compose(*overrides)), tmp_path / "other").create_optimizer()
    rates = {name: group["lr"] for group in built.param_groups for name in group["param_names"]}
    assert rates == {each["name"]: each["lr"] for each in written(tmp_path / "run")}


def test_the_table_names_the_rule_of_a_new_head(words: Callable[..., list[str]], cli: Callable[..., Finished]) -> None:
    lines = [line.split("|")[1:5] for line in cli("inspect", *words()).out.splitlines() if "| new_head" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["bias", "head_no_decay", "new_head_no_decay", "0.02"],
        ["saved_module", "head", "new_head", "0.02"],
    ]


def test_a_resumed_run_keeps_the_rate_of_its_new_head(
    words: Callable[..., list[str]], stopped: Callable[..., None], compose: Callable[..., Any], tmp_path: Path
) -> None:
    overrides = words()
    run(compose(*overrides), tmp_path / "unbroken")
    stopped(tmp_path / "broken", *overrides, at=2)
    assert run(compose(*overrides, AUTO), tmp_path / "broken").resumed_at == [2]
    assert head_of(written(tmp_path / "broken")) == HEAD
    assert differences(tmp_path / "broken", tmp_path / "unbroken") == []


def test_the_head_of_a_continued_adapter_trains_at_lr(
    words: Callable[..., list[str]], cli: Callable[..., Finished], compose: Callable[..., Any], tmp_path: Path
) -> None:
    run(compose(*words()), tmp_path / "run")
    further = words("adapter=existing", f"adapter.path={tmp_path / 'run'}")
    # Its three labels are read from the adapter, because `inspect` reads no rows
    assert head_of(json.loads(cli("inspect", "--json", *further).out)["tensors"]) == TRAINED
    assert head_of([tensor.as_dict() for tensor in check(compose(*further)).plan.tensors]) == TRAINED
    run(compose(*further), tmp_path / "further")
    assert head_of(written(tmp_path / "further")) == TRAINED


@pytest.mark.parametrize(("new_head", "expected"), [(False, TRAINED), (True, HEAD)])
def test_a_classifiers_own_head_trains_at_lr_unless_a_new_one_replaces_it(
    new_head: bool,
    expected: Any,
    classifier: Path,
    words: Callable[..., list[str]],
    cli: Callable[..., Finished],
    compose: Callable[..., Any],
    tmp_path: Path,
) -> None:
    overrides = words(f"model.path={classifier}", f"task.new_head={str(new_head).lower()}")
    assert head_of(json.loads(cli("inspect", "--json", *overrides).out)["tensors"]) == expected
    run(compose(*overrides), tmp_path / "run")
    assert head_of(written(tmp_path / "run")) == expected


def test_an_evaluation_knows_the_new_head_of_its_run(
    classifier: Path, words: Callable[..., list[str]], compose: Callable[..., Any], tmp_path: Path
) -> None:
    rule = "+loraplus.extra_rules.mine={new_head: true, lr: 0.5}"
    result = run(compose(*words(f"model.path={classifier}", "task.new_head=true", rule)), tmp_path / "run")
    assert {each[0] for each in head_of(written(tmp_path / "run")).values()} == {"mine"}
    metrics = evaluate_on(open_run(str(tmp_path / "run")), {})
    assert metrics["eval_accuracy"] == pytest.approx(result.value)
