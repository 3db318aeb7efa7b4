"""Every option of every group that isn't a task's or its rows' composes, checks and runs two steps on a tiny model.

Named models run on a tiny checkpoint of their own architecture; tasks and data have tests of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from loraplus_hydra import run
from loraplus_hydra.config.locations import config_folder
from tests.support.architectures import CAUSAL, config_of, one_of_each_architecture


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight rows for a causal model and for a classifier."""
    folder = tmp_path_factory.mktemp("few")
    words = ["one", "two"] * 4
    causal, labels = folder / "rows.jsonl", folder / "rows.csv"
    causal.write_text("".join(json.dumps({"prompt": "say", "completion": f" {word}"}) + "\n" for word in words))
    labels.write_text("text,label\n" + "".join(f"say {word},{word}\n" for word in words))
    return {"causal": causal, "labels": labels}


def two_steps(config: DictConfig, folder: Path) -> None:
    result = run(config, folder)
    assert (result.status, result.steps) == ("ok", 2)
    assert result.value is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("grad_norm", 0) > 0 for line in lines)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


COMMON = ["trainer.max_steps=2", "trainer.eval_strategy=no", "trainer.per_device_train_batch_size=2"]


NAMED = [name for name in options("model") if name not in ("hub", "embedded")]


@pytest.mark.parametrize("name", one_of_each_architecture(NAMED))
def test_named_model_runs_on_its_own_architecture(
    name: str, checkpoints: Any, few_rows: dict[str, Path], compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    named = compose(f"model={name}").model
    architecture = named.config.model_type
    tiny = config_of(architecture)
    # The YAML's own sizes are those of the published weights.
    sizes = [f"model.config.{key}={getattr(tiny, key)}" for key in named.config if key != "model_type"]
    overrides = [
        f"model={name}",
        f"model.path={checkpoints(architecture)}",
        *sizes,
        *rows_for(architecture, few_rows),
        *COMMON,
    ]
    two_steps(compose(*overrides), tmp_path / "run")


FITTING = {  # what an option goes with, where it doesn't go with everything
    "adapter=adalora": ["loraplus=roles", "adapter.deltaT=1"],
    "adapter=eva": ["adapter.r=1", "adapter.eva_config.use_label_mask=false"],
    "adapter=loftq": ["quantization=nf4"],
    "adapter=vera": ["loraplus=roles"],
    "optimizer=schedulefree_adamw": ["scheduler=constant"],
    "loraplus=absolute": ["loraplus.lr_A=1e-4", "loraplus.lr_B=1e-3"],
}
NEEDS_MORE = ("adapter=existing",)  # a path: tests/models/test_adapter_existing.py


def rows_for(architecture: str, few_rows: dict[str, Path]) -> list[str]:
    """Overrides for rows and task that an architecture can learn."""
    if architecture in CAUSAL:
        return ["data=jsonl", f"data.train={few_rows['causal']}", "task.samples=0"]
    labels = few_rows["labels"]
    return ["task=classification", "data=csv", f"data.train={labels}", f"data.eval={labels}"]


GROUPS = ("adapter", "quantization", "loraplus", "optimizer", "scheduler")


def choices() -> list[str]:
    """Every option of these groups."""
    found = [f"{group}={name}" for group in GROUPS for name in options(group)]
    return [option for option in found if option not in NEEDS_MORE]


# Optimizers that not every adapter, schedule and quantisation goes with
ALONE = ("muon", "lora_fa", "riemannian_adamw", "schedulefree_adamw")


def together() -> list[list[str]]:
    """Every option of these groups in one of a few runs, an optimizer in each."""
    rows = [[f"optimizer={name}"] for name in options("optimizer") if name not in ALONE]
    # Quantised bases at the end, without a method that changes the base; presets beside adapters that need none
    presets = ["default", "absolute", "none", "peft"]
    columns = {
        "scheduler": options("scheduler"),
        "adapter": [name for name in options("adapter") if f"adapter={name}" not in NEEDS_MORE],
        "quantization": [*[""] * (len(rows) - 2), "int8", "nf4", "none"],
        "loraplus": ["", *presets, "", "", "", "roles"],
    }
    for group, names in columns.items():
        for place, name in enumerate(names):
            if name:
                rows[place % len(rows)].append(f"{group}={name}")
    return [*rows, *([f"optimizer={name}"] for name in ALONE)]


def test_all_options_are_in_one_of_the_runs() -> None:
    assert sorted(option for row in together() for option in row) == sorted(choices())


def run_with(
    chosen: list[str], checkpoints: Any, few_rows: dict[str, Path], compose: Callable[..., DictConfig], folder: Path
) -> None:
    if chosen[0] == "optimizer=schedulefree_adamw":
        pytest.importorskip("schedulefree")
    base = ["model=hub", f"model.path={checkpoints('llama')}", "data=jsonl", f"data.train={few_rows['causal']}"]
    fitting = [word for option in chosen for word in FITTING.get(option, []) if word not in chosen]
    two_steps(compose(*base, "task.samples=0", *COMMON, *chosen, *fitting), folder)


@pytest.mark.parametrize("chosen", together(), ids=" ".join)
def test_options_run_two_steps_together(
    chosen: list[str], checkpoints: Any, few_rows: dict[str, Path], compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    run_with(chosen, checkpoints, few_rows, compose, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("option", choices())
def test_option_runs_two_steps(
    option: str, checkpoints: Any, few_rows: dict[str, Path], compose: Callable[..., DictConfig], tmp_path: Path
) -> None:
    run_with([option], checkpoints, few_rows, compose, tmp_path / "run")


OTHERS = {"gpt2": ("lora_embeddings",), "bert": ("pissa",), "mistral": (), "gemma": ("lora",)}


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [
        pytest.param(architecture, adapter, marks=[] if adapter in OTHERS[architecture] else pytest.mark.slow)
        for architecture in OTHERS
        for adapter in ("lora", "pissa", "lora_embeddings")
    ],
)
def test_adapter_runs_on_other_architectures(
    architecture: str, adapter: str, checkpoints: Any, few_rows: Any, compose: Callable[..., Any], tmp_path: Path
) -> None:
    base = ["model=hub", f"model.path={checkpoints(architecture)}", f"adapter={adapter}"]
    two_steps(compose(*base, *rows_for(architecture, few_rows), *COMMON), tmp_path / "run")


@pytest.mark.parametrize("option", ["activation_checkpointing=true", "gradient_accumulation_steps=2"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_trainers_switches_run(
    architecture: str, option: str, checkpoints: Any, few_rows: Any, compose: Callable[..., Any], tmp_path: Path
) -> None:
    base = ["model=hub", f"model.path={checkpoints(architecture)}", f"trainer.{option}"]
    two_steps(compose(*base, *rows_for(architecture, few_rows), *COMMON), tmp_path / "run")


@pytest.mark.slow
def test_compiled_model_runs(checkpoints: Any, few_rows: Any, compose: Callable[..., Any], tmp_path: Path) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not torch.cuda.is_available():
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            pytest.skip("there is no C++ compiler here")
    base = ["model=hub", f"model.path={checkpoints('llama')}", "data=jsonl", f"data.train={few_rows['causal']}"]
    two_steps(compose(*base, "task.samples=0", *COMMON, "trainer.torch_compile=true"), tmp_path / "run")
