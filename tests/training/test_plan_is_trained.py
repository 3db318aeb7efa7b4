"""The optimizer after the first step has the groups that the table and param_groups.json show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Finished
from tests.support.processes import command_line, run_in_two_ranks
from tests.support.tiny import write_jsonl

RUNS = {
    "sft": ("data.train={rows}",),
    "classification": ("task=classification", "data.train={labels}"),
    "dpo": ("task=dpo", "data.train={pairs}"),
}
COMMON = (
    *(
        "model=hub",
        "data=jsonl",
        "trainer.max_steps=1",
        "trainer.save_steps=1",
        "trainer.per_device_train_batch_size=2",
    ),
    *("trainer.eval_strategy=no", "task.samples=0", "adapter=dora", "loraplus.ratio=16", "optimizer.weight_decay=0.5"),
    "adapter.target_modules=[q_proj,embed_tokens]",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    words = ("one", "two", "three", "four")
    labels = [{"text": f"say {words[i % 4]} {i}", "label": words[i % 2]} for i in range(20)]
    pairs = [{"prompt": f"say {word} {i}", "chosen": f" {word}", "rejected": " no"} for i in range(5) for word in words]
    return {
        "rows": rows,
        "labels": write_jsonl(folder / "labels.jsonl", labels),
        "pairs": write_jsonl(folder / "pairs.jsonl", pairs),
    }


def groups_of_optimizer(run: Path) -> dict[str, dict[str, Any]]:
    """Rate, decay, names and shapes of each group, as the optimizer had them after its first step."""
    file = run / "checkpoints" / "checkpoint-1" / "optimizer.pt"
    stored = torch.load(file, weights_only=True)
    return {
        group["name"]: {
            "lr": group["initial_lr"],  # `lr` is the schedule's rate for the next step
            "weight_decay": group["weight_decay"],
            # Adam's state has the shape of the tensor that it really belongs to.
            "tensors": {
                name: tuple(stored["state"][index]["exp_avg"].shape)
                for name, index in zip(group["param_names"], group["params"], strict=True)
            },
        }
        for group in stored["param_groups"]
    }


def groups_of_file(run: Path) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for entry in json.loads((run / "param_groups.json").read_text()):
        rates = {"lr": entry["lr"], "weight_decay": entry["weight_decay"]}
        group = groups.setdefault(entry["group"], {**rates, "tensors": {}})
        assert group.items() >= rates.items()
        group["tensors"][entry["name"]] = tuple(entry["shape"])
    return groups


def rows_of_table(output: str) -> Counter[tuple[str, float, float, int]]:
    """(group, lr, weight decay, tensors) of each row of the table on the screen."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in output.splitlines()]
    cells = [line for line in lines if len(line) == 8 and line[0] != "role"]
    return Counter((row[2], float(row[3]), float(row[4]), int(row[6].replace(",", ""))) for row in cells)


def assert_they_agree(run: Path, output: str) -> None:
    optimizer = groups_of_optimizer(run)
    assert optimizer == groups_of_file(run)
    assert len(optimizer) >= 3
    table: Counter[tuple[str, float, float]] = Counter()
    for (group, lr, decay, tensors), times in rows_of_table(output).items():
        table[group, lr, decay] += tensors * times
    shown = {(name, float(f"{g['lr']:.3g}"), g["weight_decay"]): len(g["tensors"]) for name, g in optimizer.items()}
    assert table == shown


@pytest.mark.parametrize("task", RUNS)
def test_table_and_file_show_the_optimizers_groups(
    task: str, cli: Callable[..., Finished], tiny_model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    overrides = [override.format(**files) for override in RUNS[task]]
    finished = cli(*COMMON, *overrides, f"model.path={tiny_model}", "hydra.run.dir=run")
    assert finished.status == 0, finished.err
    assert_they_agree(tmp_path / "run", finished.out)


def test_table_and_file_show_the_optimizers_groups_under_ddp(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    overrides = [*COMMON, f"data.train={rows}", f"model.path={tiny_model}", "hydra.run.dir=run", "trainer=cpu"]
    ended = run_in_two_ranks(command_line, *overrides, folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    assert_they_agree(tmp_path / "run", ended.out)
