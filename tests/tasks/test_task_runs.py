"""Each task trains on each shape of rows: two steps of a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from loraplus_hydra.runs.job import run
from tests.conftest import Finished
from tests.support.tiny import write_jsonl

TURNS = [
    {"role": "user", "content": "say 1"},
    {"role": "assistant", "content": "the number 1"},
    {"role": "user", "content": "and after"},
    {"role": "assistant", "content": "the number 2"},
]
PAIRS = [{"prompt": f"say {number}", "completion": f"the number {number}"} for number in range(8)]
TEXTS = [{"text": f"the number after {number} is {number + 1}"} for number in range(8)]
CARDS = [{"text": "the card has arrived", "other": "say 1", "label": number % 2} for number in range(8)]
CLASSIFY = ["task=classification"]

RUNS: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "prompt and completion": ("plain", PAIRS, []),
    "prompt and completion in a template": ("llama", PAIRS, []),
    "turns as prompt and completion": ("llama", [{"prompt": TURNS[:3], "completion": TURNS[3:]}] * 4, []),
    "conversations": ("llama", [{"messages": TURNS}] * 4, []),
    "the assistant's turns": ("llama", [{"messages": TURNS}] * 4, ["task.args.assistant_only_loss=true"]),
    "plain text, fine-tuned": ("llama", TEXTS, []),
    "packed": ("llama", PAIRS, ["task.args.packing=true", "task.args.max_length=32"]),
    "packed conversations": (
        "llama",
        [{"messages": TURNS}] * 4,
        ["task.args.packing=true", "task.args.max_length=64", "task.args.assistant_only_loss=true"],
    ),
    "preferences, streamed": (
        "llama",
        [{"chosen": TURNS, "rejected": [*TURNS[:3], {**TURNS[3], "content": "the dog"}]}] * 4,
        ["task=dpo", "data.streaming=true"],
    ),
    "judged conversations": (
        "llama",
        [
            {"messages": [*TURNS[:3], {"role": "assistant", "content": f"the number {n}"}], "label": n % 2 == 0}
            for n in range(8)
        ],
        ["experiment=kto"],
    ),
    "streamed": ("llama", PAIRS, ["data.streaming=true"]),
    "one label": ("bert", CARDS, CLASSIFY),
    "one label of a causal model": ("llama", CARDS, CLASSIFY),
    "pairs of texts": ("bert", CARDS, [*CLASSIFY, "data.text_pair_column=other"]),
    "several labels": (
        "bert",
        [{"text": "a card", "label": ["a", "b"]}, {"text": "the dog", "label": ["a"]}] * 4,
        [*CLASSIFY, "task.metric=eval_f1"],
    ),
    "measured numbers": (
        "bert",
        [{"text": "a card", "label": 0.5}, {"text": "the dog", "label": 2}] * 4,
        [*CLASSIFY, "task.metric=eval_pearson"],
    ),
    "text": ("llama", TEXTS, ["task=text", "task.block_size=16"]),
    "text, streamed": ("llama", TEXTS * 4, ["task=text", "task.block_size=16", "data.streaming=true"]),
}


SLOW = (
    *("prompt and completion", "turns as prompt and completion", "plain text, fine-tuned", "packed", "streamed"),
    *("one label of a causal model", "text, streamed"),
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in RUNS])
def test_task_trains_on_shape(
    name: str,
    compose: Callable[..., Any],
    tmp_path: Path,
    llama_folder: Path,
    plain_llama_folder: Path,
    bert_folder: Path,
) -> None:
    model, rows, overrides = RUNS[name]
    folder = {"llama": llama_folder, "plain": plain_llama_folder, "bert": bert_folder}[model]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = compose(
        "model=hub",
        f"model.path={folder}",
        "data=jsonl",
        f"data.train={path}",
        f"data.eval={path}",
        "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=2",
        "trainer.logging_steps=1",
        "trainer.use_cpu=true",
        "task.sample_tokens=2",
        *overrides,
    )
    result = run(config, tmp_path / "run")
    assert (result.status, result.steps) == ("ok", 2)
    assert math.isfinite(result.train_loss)
    assert math.isfinite(result.metrics_before[result.metric])
    assert math.isfinite(result.value)
    assert result.metrics["eval_loss"] != result.metrics_before["eval_loss"]
    assert PeftConfig.from_pretrained(tmp_path / "run" / "adapter").task_type == config.task.task_type


LONG = "long " * 40
WITHOUT_A_STEP: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "streamed, nothing left to learn": (
        [{"prompt": LONG, "completion": "a word"}] * 4,
        ["data.streaming=true", "task.args.max_length=16"],
    ),
    "preferences": (
        [{"prompt": LONG, "chosen": f"{LONG} yes", "rejected": "no"}] * 4,
        ["task=dpo", "task.args.max_length=16"],
    ),
    "judged answers": (
        [{"prompt": LONG, "completion": f"{LONG} {n}", "label": n % 2 == 0} for n in range(8)],
        ["experiment=kto", "task.args.max_length=16"],
    ),
}


def overrides_of(folder: Path, path: Path, eval_path: Path, overrides: list[str]) -> list[str]:
    return [
        *(
            "model=hub",
            f"model.path={folder}",
            *overrides,
            "data=jsonl",
            f"data.train={path}",
            f"data.eval={eval_path}",
        ),
        *("trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "trainer.use_cpu=true", "task.samples=0"),
    ]


@pytest.mark.parametrize("name", WITHOUT_A_STEP)
def test_run_that_takes_no_step_fails(
    name: str, cli: Callable[..., Finished], tmp_path: Path, plain_llama_folder: Path
) -> None:
    rows, overrides = WITHOUT_A_STEP[name]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    short = {key: value if isinstance(value, bool) else f"a {key}" for key, value in rows[0].items()}
    eval_path = write_jsonl(tmp_path / "eval.jsonl", [short, {**short, "prompt": "b"}] * 2)
    finished = cli(*overrides_of(plain_llama_folder, path, eval_path, overrides), "hydra.run.dir=run")
    assert finished.status == 1
    assert "max_length" in finished.err
    assert not (tmp_path / "run" / "adapter").exists()


def test_rows_that_a_trainer_leaves_out_are_counted(
    cli: Callable[..., Finished], tmp_path: Path, plain_llama_folder: Path
) -> None:
    rows = [{"prompt": LONG if n % 3 == 0 else f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    overrides = ["task=dpo", "task.args.max_length=24"]
    finished = cli(*overrides_of(plain_llama_folder, path, path, overrides), "hydra.run.dir=run")
    assert finished.status == 0, finished.err
    assert "3 of 9 train rows are dropped by DPOTrainer (nothing to learn within task.args.max_length)" in finished.out
