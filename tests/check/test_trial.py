"""Arguments that a Trainer refuses only when it is made or trains are refused by `check`, and no others are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra.check import check
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.runs.job import run


@pytest.fixture
def classifier(tmp_path: Path, bert_folder: Path) -> list[str]:
    """Overrides of a short run of a classifier."""
    lines = "".join(f"the fox {i},{'yes' if i % 2 else 'no'}\n" for i in range(12))
    (tmp_path / "labels.csv").write_text("text,label\n" + lines)
    words = ["task=classification", "data=csv", f"data.train={tmp_path / 'labels.csv'}", "model=hub"]
    return [*words, f"model.path={bert_folder}", "trainer.max_steps=1", "trainer.per_device_train_batch_size=4"]


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["+trainer.label_names=[answer]"], "label_names", "'eval_accuracy', which is not found"),
        (["+trainer.batch_eval_metrics=true"], "batch_eval_metrics", "compute_result"),
        (
            ["trainer.activation_checkpointing=true", "+trainer.activation_checkpointing_kwargs={speed: 1}"],
            "activation_checkpointing_kwargs",
            "Unexpected keyword arguments: speed",
        ),
        (
            ["+trainer.eval_accumulation_steps=0", "+trainer.label_smoothing_factor=0.1"],
            "eval_accumulation_steps",
            "by zero",
        ),
    ],
)
def test_argument_that_would_fail_in_the_first_step_is_an_error(
    overrides: list[str], key: str, reason: str, classifier: list[str], compose: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigErrors) as caught:
        check(compose(*classifier, *overrides))
    (problem,) = caught.value.problems
    assert problem.key == f"trainer.{key}"
    assert reason in problem.what


def test_arguments_that_suit_the_trainer_pass_and_train(
    classifier: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["+trainer.eval_accumulation_steps=2", "+trainer.label_smoothing_factor=0.1"]
    config = compose(*classifier, *words, "+trainer.neftune_noise_alpha=5")
    generator, before = random.getstate(), torch.get_rng_state()
    checked = check(config)
    assert random.getstate() == generator
    assert torch.equal(torch.get_rng_state(), before)
    assert run(checked, tmp_path / "run").steps == 1


def test_rows_that_no_trainer_takes_are_not_an_arguments_fault(
    tiny_run: list[str], compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such as the first rows of a file, which are too long to learn from.
    monkeypatch.setattr("loraplus_hydra.check.trial._few", lambda rows: rows.select([]))
    check(compose(*tiny_run, "+trainer.neftune_noise_alpha=5"))


def test_a_config_of_listed_keys_needs_no_trial(
    tiny_run: list[str], compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplus_hydra.check.trial._failure", None)
    check(compose(*tiny_run))
