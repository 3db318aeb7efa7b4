"""The estimate of a step's memory, beside the peak that torch's profiler measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import activations
from loraplus_hydra.training.hf_trainer import step_memory
from loraplus_hydra.training.hf_trainer.step_memory import longest_rows
from tests.conftest import Finished

CONFIG: Any = OmegaConf.load(Path(activations.__file__).with_suffix(".yaml"))
IN_EACH_RUN = ("Llama, lean, dropout, 4 batches of 4 rows", "GPT-2, recomputed, 4 rows", "RoBERTa, plain, 8 rows")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EACH_RUN else pytest.mark.slow) for name in CONFIG.settings]
)
def test_estimate_is_the_measured_peak_within_a_tenth(name: str, models: Path) -> None:
    model, *words = CONFIG.settings[name]
    overrides = [each for each in activations.overrides_of(model, words, CONFIG, models) if "max_samples" not in each]
    samples = [] if model == "roberta" else ["data.max_samples=64"]
    estimated, measured = activations.compare([*overrides, *samples])
    assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_step_of_preferences_is_estimated(task: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "say one", "chosen": " one", "rejected": " two three"}]
    if task == "kto":
        lines = [{"prompt": "say one", "completion": " one", "label": label} for label in ("true", "false")]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines) * 4)
    chosen = ["task=dpo"] if task == "dpo" else ["experiment=kto"]
    words = ["model=hub", f"model.path={tiny_model}", "data=jsonl", f"data.train={rows}", f"data.eval={rows}"]
    estimated, measured = activations.compare([*chosen, *words, "trainer.per_device_train_batch_size=4"])
    assert estimated == pytest.approx(measured, rel=0.1)


def test_longest_rows_are_chosen_and_repeated() -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [1] * length} for length in (3, 9, 5)])
    lengths = [len(row) for row in longest_rows(rows, 2, tokens=0)["input_ids"]]
    assert lengths == [9, 5]
    assert [len(row) for row in longest_rows(rows, 4, tokens=0)["input_ids"]] == [9, 5, 3, 9]
    assert len(longest_rows(rows, 2, tokens=20)) == 16  # two packed rows of 20 tokens need four rows of 5 each


def test_forward_of_the_trace_is_the_one_that_the_run_takes(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for overrides, forward in (
        ([], "plain"),  # on a GPU
        (["trainer.use_cpu=true"], "auto"),
        (["trainer.forward=lean"], "lean"),
    ):
        assert step_memory._for_trace(compose(*overrides)).trainer.forward == forward


def test_inspect_shows_activations_and_what_recomputing_changes(
    cli: Any, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.runs import inspection

    monkeypatch.setattr(inspection, "step_memory", step_memory.step_memory)
    shown: Finished = cli("inspect", *tiny_run, "task.args.max_length=64")
    assert shown.status == 0
    assert "activations, 4 rows of 64 tokens" in shown.out
    assert "With trainer.activation_checkpointing=true: " in shown.out


def test_check_with_a_trial_says_the_time_of_a_step(cli: Any, tiny_run: list[str], tmp_path: Path) -> None:
    shown: Finished = cli("check", "trial=true", *tiny_run)
    assert shown.status == 0, shown.err
    assert "s, so 4 steps take about 0:" in shown.out
    assert list(tmp_path.iterdir()) == []  # nothing is written
