"""Runs on a GPU: the numbers of a CPU, resumed to the bit, 8-bit state where it belongs; skipped without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from loraplus_hydra import run
from loraplus_hydra.check import check
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.inspection import estimate_memory
from loraplus_hydra.training.hf_trainer.step_memory import step_memory
from loraplus_hydra.training.prepare import prepare_examples
from loraplus_hydra.training.utilisation import peak_flops
from tests.conftest import Finished
from tests.support.forking import differences, lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and -m gpu"),
]

NO_EVALUATION = "trainer.eval_strategy=no"
SHORT = ("trainer.max_steps=8", "trainer.logging_steps=1", "trainer.save_steps=2", "adapter.lora_dropout=0.1")
RESUMED = {
    "AdamW": ("optimizer=adamw",),
    "8-bit AdamW": ("optimizer=adamw8bit", "adapter.r=128"),
    "paged AdamW": ("optimizer=paged_adamw32bit",),
    "bfloat16": ("model.dtype=bfloat16",),
    "bfloat16 autocast": ("trainer.bf16=true",),
    "nf4": ("quantization=nf4",),
    "int8": ("quantization=int8",),
    "DoRA": ("adapter=dora",),
    "lean": ("trainer.forward=lean",),
}


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    """Compute the same sums in the same order in both runs of a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.parametrize("forward", ["plain", "lean"])
def test_float32_losses_are_those_of_a_cpu(
    forward: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, "trainer.max_steps=20"]
    run(compose(*overrides, "trainer.use_cpu=true", "trainer.forward=plain"), tmp_path / "cpu")
    run(compose(*overrides, f"trainer.forward={forward}"), tmp_path / "gpu")
    assert len(losses(tmp_path / "gpu")) == 20
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


@pytest.mark.parametrize("variant", RESUMED)
def test_stopped_run_goes_on_to_the_bits_of_the_unbroken_one(
    variant: str, stopped: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *SHORT, *RESUMED[variant]]
    run(compose(*overrides), tmp_path / "unbroken")
    stopped(tmp_path / "broken", *overrides, at=5)
    result = run(compose(*overrides, "trainer.resume_from_checkpoint=auto"), tmp_path / "broken")
    assert result.resumed_at == [5]
    assert differences(tmp_path / "broken", tmp_path / "unbroken") == []


def test_8bit_optimizer_keeps_embeddings_in_32_bits(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    run(compose(*tiny_run, "optimizer=adamw8bit", "adapter=lora_embeddings", "adapter.r=128"), tmp_path / "run")
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    names = [name for group in stored["param_groups"] for name in group["param_names"]]
    positions = [position for group in stored["param_groups"] for position in group["params"]]
    # bitsandbytes stores a tensor's state in a mapping of its own, beside the step.
    states = {at: state.get("__bnb_optimizer_quant_state__", state) for at, state in stored["state"].items()}
    state = {name: states[at]["state1"].dtype for name, at in zip(names, positions, strict=True)}
    assert {dtype for name, dtype in state.items() if "lora_embedding" in name} == {torch.float32}
    assert torch.uint8 in {dtype for name, dtype in state.items() if "lora_embedding" not in name}


def test_peak_memory_is_the_gpus(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    result = run(compose(*tiny_run), tmp_path / "run")
    assert 0 < result.peak_memory_bytes < 2**30  # a process on a CPU takes more for its libraries alone


@pytest.mark.parametrize("changes", [(), ("trainer.forward=lean",), ("model.attention=eager",)])
def test_memory_on_a_gpu_is_estimated(changes: tuple[str, ...], compose: Callable[..., Any], tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    config = compose(
        *("trainer.max_steps=2", "trainer.per_device_train_batch_size=64", "task.samples=0", "data.max_samples=300"),
        *(NO_EVALUATION, *changes),
    )
    checked = check(config)
    tokenizer = load_tokenizer(config.model)
    memory, _ = estimate_memory(checked, step_memory(config, prepare_examples(config, tokenizer), tokenizer))
    result = run(config, tmp_path / "run")
    ratio = memory.total / result.peak_memory_bytes
    print(f"{changes}: estimated {memory.total / 2**20:.1f} MiB, allocated {result.peak_memory_bytes / 2**20:.1f} MiB")
    assert 0.9 < ratio < 2


def test_auto_batch_finds_the_batch_that_fits_the_free_memory(compose: Callable[..., Any], tmp_path: Path) -> None:
    def config(size: int, accumulated: int, *more: str) -> Any:
        rows = (
            f"trainer.per_device_train_batch_size={size}",
            f"trainer.gradient_accumulation_steps={accumulated}",
            *("trainer.max_steps=2", "trainer.logging_steps=1", "task.samples=0", "data.max_samples=1024"),
        )
        return compose(*rows, NO_EVALUATION, *more)

    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    held = torch.empty(free - 3 * 2**30, dtype=torch.uint8, device="cuda")
    try:
        run(config(1024, 1, "trainer.auto_batch=true"), tmp_path / "found")
    finally:
        del held
        torch.cuda.empty_cache()
    stored = OmegaConf.load(tmp_path / "found" / "config.yaml").trainer
    size, accumulated = stored.per_device_train_batch_size, stored.gradient_accumulation_steps
    print(f"{size} rows x {accumulated}")
    assert 16 <= size < 1024
    assert size * accumulated == 1024
    run(config(size, accumulated), tmp_path / "by_hand")
    assert losses(tmp_path / "found") == pytest.approx(losses(tmp_path / "by_hand"), rel=1e-6)


def test_utilisation_is_the_share_of_the_peak(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    run(compose(*tiny_run, "model.dtype=bfloat16"), tmp_path / "run")
    logged = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    shares = {line.get("model_flops_utilisation") for line in logged if "loss" in line}
    if peak_flops(torch.cuda.get_device_name(), torch.bfloat16) is None:
        assert shares == {None}
    else:
        assert all(0 <= share < 0.9 for share in shares)


@pytest.mark.parametrize(
    "changes",
    [
        ("adapter=pissa",),
        ("adapter=olora",),
        ("adapter=eva", "adapter.r=2", "adapter.eva_config.use_label_mask=false"),
        ("adapter=loftq", "quantization=nf4"),
    ],
    ids=str,
)
def test_adapters_with_a_start_of_their_own_train_as_on_a_cpu(
    changes: tuple[str, ...],
    compose: Callable[..., Any],
    cli: Callable[..., Finished],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    run(compose(*tiny_run, *changes, "trainer.use_cpu=true"), tmp_path / "cpu")
    run(compose(*tiny_run, *changes), tmp_path / "gpu")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=2e-2)
    ended = cli("export", "gpu", "to=exported")
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("optimizer", ["lora_fa", "riemannian_adamw"])
def test_optimizers_made_for_lora_step_on_a_gpu(
    optimizer: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    gpu, cpu = (tmp_path / name for name in ("gpu", "cpu"))
    run(compose(*tiny_run, f"optimizer={optimizer}", "trainer.use_cpu=true"), cpu)
    run(compose(*tiny_run, f"optimizer={optimizer}"), gpu)
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-3)


def test_adapter_predicts_exports_and_evaluates(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    ended = cli(*tiny_run, "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    for command in (("evaluate", "run"), ("predict", "run", "text=say one"), ("export", "run", "to=exported")):
        ended = cli(*command)
        assert ended.status == 0, (command, ended.err)
    assert (tmp_path / "exported" / "model.safetensors").exists()
