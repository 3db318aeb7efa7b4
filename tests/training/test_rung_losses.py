"""The losses of a rung's rows are those of the model on each row alone, also where they are computed in batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from loraplus_hydra.errors import UserError
from loraplus_hydra.training.hf_trainer import rung
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.hf_trainer.loraplus_mixin import NotFiniteError
from loraplus_hydra.training.prepare import prepare
from tests.support.tiny import write_jsonl

WORDS = ("one", "two", "three", "four")
LABELS: dict[str, Callable[[int], Any]] = {  # kind of labels -> the label of a row
    "one of several": lambda i: WORDS[i % 4],
    "several": lambda i: [WORDS[i % 4], WORDS[(i + 1 + i % 3) % 4]],
    "a number": lambda i: i / 7,
}


@pytest.fixture
def trainer_of(compose: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return a function from overrides to a trainer with eight held-out rows a batch. Its adapter changes the model."""

    def make(*overrides: str) -> Any:
        config = compose("data.eval_fraction=0.5", "trainer.per_device_eval_batch_size=8", *overrides)
        config.adapter.init_lora_weights = False
        trainer = make_trainer(prepare(config), tmp_path)
        trainer.model.eval()
        return trainer

    return make


def batches_of(trainer: Any) -> list[int]:
    """Return a list that is filled with the number of rows of each call of the model."""
    sizes: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda _module, _inputs, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    return sizes


def scores_of(trainer: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of a row's labels, from the logits of the row alone, and the labels."""
    ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = trainer.model(input_ids=ids[None]).logits[0, :-1]
    kept = labels[1:] != -100
    return logits.log_softmax(-1)[kept].gather(1, labels[1:][kept, None]), labels[1:][kept]


@pytest.mark.parametrize("forward", ["lean", "plain"])
def test_rows_of_a_language_model_are_measured_in_batches(
    forward: str, tiny_run: list[str], trainer_of: Callable[..., Any]
) -> None:
    trainer = trainer_of(*tiny_run, f"trainer.forward={forward}")
    found = [scores_of(trainer, row) for row in trainer.eval_dataset]
    sizes = batches_of(trainer)
    losses, weights, metric = rung._row_losses(trainer, 1.0)
    assert losses == pytest.approx([-float(scores.mean()) for scores, _ in found], rel=1e-5)
    assert weights == tuple(float(len(labels)) for _, labels in found)
    assert metric is None
    assert sizes == [8, 8, 4]


def test_a_loss_that_the_rows_dont_have_is_measured_batch_by_batch(
    tiny_run: list[str], trainer_of: Callable[..., Any]
) -> None:
    trainer = trainer_of(*tiny_run, "+task.args.loss_type=dft")  # each token's loss times its probability
    found = [scores_of(trainer, row)[0] for row in trainer.eval_dataset]
    sizes = batches_of(trainer)
    losses, weights, _ = rung._row_losses(trainer, 1.0)
    assert sizes == [8, *[2] * 10]  # 20 rows in at least 8 batches
    together = [torch.cat(found[place : place + 2]) for place in range(0, 20, 2)]
    assert losses == pytest.approx([-float((scores * scores.exp()).mean()) for scores in together], rel=1e-5)
    assert weights == tuple(float(len(scores)) for scores in together)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("forward", ["lean", "plain"])
def test_rows_of_a_classifier_are_measured_in_batches(
    forward: str, kind: str, bert_folder: Path, tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    lines = [{"text": f"the card {WORDS[i % 4]} " * (1 + i % 5), "label": LABELS[kind](i)} for i in range(40)]
    metric = {"several": "eval_f1", "a number": "eval_pearson"}.get(kind, "eval_accuracy")
    trainer = trainer_of(
        *("task=classification", "model=hub", f"model.path={bert_folder}", "data=jsonl", f"task.metric={metric}"),
        f"data.train={write_jsonl(tmp_path / 'rows.jsonl', lines)}",
        f"trainer.forward={forward}",
    )
    rows, expected = trainer.eval_dataset, []
    for row in rows:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids", "attention_mask")}
        with torch.no_grad():
            logits = trainer.model(**batch).logits
        if kind == "one of several":
            expected.append(float(functional.cross_entropy(logits, torch.tensor([row["labels"]]))))
        elif kind == "several":
            expected.append(float(functional.binary_cross_entropy_with_logits(logits, torch.tensor([row["labels"]]))))
        else:
            expected.append(float((logits[0, 0] - row["labels"]) ** 2))
    sizes = batches_of(trainer)
    losses, weights, found = rung._row_losses(trainer, 1.0)
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert weights == (1.0,) * len(rows)
    assert sizes == [8, 8, 4]
    assert found == pytest.approx(trainer.evaluate()[metric])


@pytest.mark.parametrize(("computed", "kept"), [({"accuracy": math.nan}, None), ({}, None), ({"accuracy": 1}, 1.0)])
def test_a_metric_that_is_not_finite_is_not_compared(
    computed: dict[str, float], kept: float | None, bert_folder: Path, tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    lines = [{"text": f"the card {WORDS[i % 4]}", "label": WORDS[i % 4]} for i in range(40)]
    trainer = trainer_of(
        *("task=classification", "model=hub", f"model.path={bert_folder}", "data=jsonl"),
        f"data.train={write_jsonl(tmp_path / 'rows.jsonl', lines)}",
    )
    trainer.compute_metrics = lambda _: computed
    assert rung._row_losses(trainer, 1.0)[2] == kept


def pairs() -> list[dict[str, Any]]:
    """Return 24 rows with two answers each."""
    return [
        {"prompt": f"say {WORDS[i % 4]} {i}", "chosen": f" {WORDS[i % 4]}", "rejected": f" {WORDS[(i + 1) % 4]}"}
        for i in range(24)
    ]


@pytest.mark.parametrize("chosen", ["task=dpo", "experiment=orpo", "experiment=kto"])
def test_answers_are_compared_batch_by_batch(
    chosen: str, tiny_run: list[str], tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    lines = pairs()
    if chosen == "experiment=kto":
        lines = [
            {"prompt": one["prompt"], "completion": one["chosen"], "label": i % 2 == 0} for i, one in enumerate(lines)
        ]
    trainer = trainer_of(*tiny_run, chosen, f"data.train={write_jsonl(tmp_path / 'rows.jsonl', lines)}")
    losses, weights, _ = rung._row_losses(trainer, 1.0)
    assert weights == (2.0,) * 6  # 12 rows in at least 6 batches
    trainer.args.per_device_eval_batch_size = 2
    assert sum(losses) / 6 == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


def test_packed_rows_count_with_their_tokens(tiny_run: list[str], trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(*tiny_run, "task.args.packing=true", "task.args.max_length=64")
    rows = trainer.eval_dataset
    losses, weights, _ = rung._row_losses(trainer, 1.0)
    assert len(losses) == math.ceil(len(rows) / 2) > 1
    assert sum(map(float.__mul__, losses, weights)) / sum(weights) == pytest.approx(
        trainer.evaluate()["eval_loss"], rel=1e-4
    )


@pytest.mark.parametrize("size", [1, 8])
def test_rows_without_any_token_with_loss_are_an_error(
    size: int, tiny_run: list[str], trainer_of: Callable[..., Any]
) -> None:
    trainer = trainer_of(*tiny_run, f"trainer.per_device_eval_batch_size={size}")
    trainer.eval_dataset = trainer.eval_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(UserError, match="none of the 20 held-out rows of the rung has tokens with loss"):
        rung._row_losses(trainer, 1.0)


@pytest.mark.parametrize("size", [1, 8])
def test_a_loss_that_is_not_finite_is_an_error(size: int, tiny_run: list[str], trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(*tiny_run, f"trainer.per_device_eval_batch_size={size}")
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if "v_proj.lora_B" in name).fill_(math.nan)
    with pytest.raises(NotFiniteError, match="on a held-out row"):
        rung._row_losses(trainer, 1.0)
