"""Varied keys of a sweep, from overrides, sweep.json and configs, and their short names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.report.formatting import names, short
from loraplus_hydra.report.read_sweep import read_sweep
from loraplus_hydra.report.settings import varied_keys
from loraplus_hydra.report.write import write_report
from tests.support.finished_sweeps import ratio_sweep, write_job, write_sweep


def test_keys_that_follow_a_swept_one_are_not_varied_keys(tmp_path: Path) -> None:
    """A rule repeats the ratio, and data.seed follows seed: neither is a varied key."""
    results = ratio_sweep(tmp_path, {(ratio, seed): 3.7 for ratio in (1, 4) for seed in (1, 2)})
    assert results.keys == ("loraplus.ratio", "seed")


def test_keys_of_folders_without_overrides_are_found_in_their_configs(tmp_path: Path) -> None:
    ratio_sweep(tmp_path, {(ratio, seed): 3.7 for ratio in (1, 4) for seed in (1, 2)})
    for folder in tmp_path.iterdir():
        (folder / ".hydra" / "overrides.yaml").unlink()
    assert varied_keys(read_sweep(tmp_path)) == ("loraplus.ratio", "seed")


def test_option_of_a_group_is_one_key_whatever_it_changes(tmp_path: Path) -> None:
    for place, (option, lr) in enumerate((("adamw", 5e-5), ("lion", 1e-5))):
        folder = write_job(tmp_path / str(place), {"optimizer.lr": lr, "optimizer.x": option}, 3.7)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- optimizer={option}\n")
    assert varied_keys(read_sweep(tmp_path)) == ("optimizer",)


UNTRAINED: dict[str, Any] = {
    "trainer.resume_from_checkpoint": "auto",
    "trainer.save_steps": 7,
    "trainer.logging_steps": 3,
    "task.samples": 2,
    "logger.folder": "here",
    "allow_changed_inputs": True,
    "forgetting": "rows.jsonl",
}


def test_key_without_influence_on_training_is_varied_only_if_it_was_swept(tmp_path: Path) -> None:
    write_job(tmp_path / "0", {"loraplus.ratio": 1}, 3.7)
    write_job(tmp_path / "1", {"loraplus.ratio": 4, **UNTRAINED}, 3.6)
    assert varied_keys(read_sweep(tmp_path)) == ("loraplus.ratio",)
    (tmp_path / "1" / ".hydra" / "overrides.yaml").unlink()
    assert varied_keys(read_sweep(tmp_path)) == ("loraplus.ratio",)
    write_sweep(tmp_path, swept=["trainer.save_steps"])
    assert varied_keys(read_sweep(tmp_path)) == ("trainer.save_steps", "loraplus.ratio")


def test_grid_that_is_run_with_and_without_halving_has_no_key_more(tmp_path: Path) -> None:
    for place, (ratio, words) in enumerate(
        ((1, []), (4, ["halving=true", "hparams_search=halving", "launcher=joblib", "sweep.name=x"]))
    ):
        folder = write_job(tmp_path / str(place), {"loraplus.ratio": ratio}, 3.7)
        lines = [f"- {word}" for word in (f"loraplus.ratio={ratio}", *words)]
        (folder / ".hydra" / "overrides.yaml").write_text("\n".join(lines) + "\n")
    assert varied_keys(read_sweep(tmp_path)) == ("loraplus.ratio",)


WHOLE_OR_INFINITE = [
    (20240101, "20240101"),
    (32768, "32768"),
    (math.inf, "inf"),
    (-math.inf, "-inf"),
    (math.nan, "nan"),
]


def test_batches_that_the_memory_decided_are_no_varied_key(tmp_path: Path) -> None:
    """Each step has the 16 rows of the override. Only the first job found memory for all of them at once."""
    for seed, (size, batches) in enumerate(((16, 1), (8, 2), (8, 2))):
        found = {"trainer.per_device_train_batch_size": size, "trainer.gradient_accumulation_steps": batches}
        folder = write_job(tmp_path / str(seed), {"seed": seed, "trainer.auto_batch": True, **found}, 3.5)
        words = [f"seed={seed}", "trainer.auto_batch=true", "trainer.per_device_train_batch_size=16"]
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(words))
    assert varied_keys(read_sweep(tmp_path)) == ("seed",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0008, "8e-4"),
        (5e-05, "5e-5"),
        (16.0, "16"),
        (0.0125, "0.0125"),
        (1.6e-3, "1.6e-3"),
        (True, "true"),
        (0, "0"),
        *WHOLE_OR_INFINITE,
    ],
)
def test_numbers_are_short(value: Any, text: str) -> None:
    assert short(value) == text


def test_a_number_is_one_value_with_and_without_a_point(tmp_path: Path) -> None:
    """The YAML has 8.0, and the command line 8."""
    values: dict[Any, float] = {(8.0, 1): 3.5, (8, 2): 3.7, (4, 1): 3.6, (4.0, 2): 3.5}
    results = ratio_sweep(tmp_path, values)
    found = {one.values["loraplus.ratio"]: sorted(one.measured) for one in results.settings}
    assert found == {4: [3.5, 3.6], 8: [3.5, 3.7]}
    assert results.outcome.best is not None
    assert results.outcome.best.values == {"loraplus.ratio": 4}


def test_infinite_value_of_a_key_is_reported(tmp_path: Path) -> None:
    for norm in (0.5, 1.0, math.inf):
        write_job(tmp_path / str(norm), {"trainer.max_grad_norm": norm, "optimizer.weight_decay": norm, "x.y": 1}, 3.5)
    write_report(tmp_path)
    assert "max_grad_norm inf" in (tmp_path / "report.html").read_text()


def test_short_names_stay_apart() -> None:
    assert names(["optimizer.lr", "model.lr", "loraplus.ratio", "seed"]) == {
        "optimizer.lr": "optimizer.lr",
        "model.lr": "model.lr",
        "loraplus.ratio": "ratio",
        "seed": "seed",
    }
