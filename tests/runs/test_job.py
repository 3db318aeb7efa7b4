"""One job, end to end: what lies in the run's folder, and that its numbers are true."""

from __future__ import annotations

import json
import math
import mmap
import os
import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra import run
from loraplus_hydra.errors import ConfigErrors, UserError
from loraplus_hydra.sweep import finish as sweep_end
from tests.conftest import Finished
from tests.support import processes

FILES = (
    ".hydra/config.yaml",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/tokenizer.json",
    "config.yaml",
    "metrics.jsonl",
    "param_groups.json",
    "result.json",
    "train.png",
)


@pytest.fixture(scope="module")
def finished_run(tiny_model: Path, rows: Path, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the tiny model with LoRA on everything, ratio 16 and a decaying rate."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = [*tiny_run, f"data.eval={rows}", f"hydra.run.dir={folder}", "loraplus.ratio=16"]
    overrides += ["trainer.save_steps=2", "trainer.max_steps=6"]
    done = processes.run(processes.command_line, *overrides, folder=folder.parent)
    assert done.status == 0, done.out
    assert f"All files are in {folder}" in done.out
    return folder


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_holds_every_file(finished_run: Path) -> None:
    for name in FILES:
        assert (finished_run / name).stat().st_size > 0, name
    assert (finished_run / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors").is_file()
    assert not [path for path in finished_run.rglob("*") if "unfinished" in path.name]


def test_result_states_how_the_run_ended(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert result["status"] == "ok"
    assert result["error"] is None
    assert result["steps"] == 6
    assert result["metrics"]["eval_loss"] < result["metrics_before"]["eval_loss"]
    assert result["best"]["value"] <= result["metrics"]["eval_loss"]
    assert 0 < result["trained_parameters"] < result["total_parameters"]
    assert result["peak_memory_bytes"] > 1_000_000
    assert {"torch", "peft", "transformers", "hydra-core"} <= set(result["versions"])
    assert len(result["config_hash"]) == 12
    assert result["samples"][0]["prompt"].startswith("say")


def test_param_groups_lists_every_trained_tensor_with_its_rate(finished_run: Path) -> None:
    rows = json.loads((finished_run / "param_groups.json").read_text())
    from safetensors import safe_open

    with safe_open(finished_run / "adapter" / "adapter_model.safetensors", "pt") as weights:
        saved = {name: weights.get_tensor(name).shape for name in weights.keys()}  # noqa: SIM118
    listed = {row["name"].replace(".default", ""): row for row in rows}
    assert set(listed) == set(saved)
    for name, row in listed.items():
        assert row["shape"] == list(saved[name])
        is_b = "lora_B" in name
        assert row["role"] == ("lora_B" if is_b else "lora_A")
        assert row["group"] == ("groupB" if is_b else "groupA")
        assert row["lr"] == pytest.approx(1e-3 * (16 if is_b else 1))
        assert row["weight_decay"] == 0.0


def test_metrics_hold_each_groups_rate_at_each_step(finished_run: Path) -> None:
    trained = [line for line in read_lines(finished_run) if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    for index, line in enumerate(trained):
        # linear without warm-up: step k of n trains at (n - k + 1) / n of the rate
        assert line["lr"]["groupA"] == pytest.approx(1e-3 * (6 - index) / 6)
        assert line["lr"]["groupB"] == pytest.approx(16 * line["lr"]["groupA"])
        assert math.isfinite(line["grad_norm"])


def test_config_is_stored_resolved(finished_run: Path) -> None:
    text = (finished_run / "config.yaml").read_text()
    assert "${" not in text
    assert "ratio: 16" in text


def token_mean_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean loss a completion token, row by row: the definition, without padding, batches or a Trainer."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[len(prompt) - 1 :]
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


def test_saved_adapter_merged_by_peft_gives_the_stated_loss(finished_run: Path, tiny_model: Path, rows: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held_out = [json.loads(line) for line in rows.read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "adapter")
    merged = PeftModel.from_pretrained(base, finished_run / "adapter").merge_and_unload().eval()
    stated = json.loads((finished_run / "result.json").read_text())["metrics"]["eval_loss"]
    assert token_mean_loss(merged, tokenizer, held_out) == pytest.approx(stated, rel=1e-4)


def test_evaluation_loss_does_not_depend_on_the_batch_size(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    losses = [
        run(
            compose(*tiny_run, "data.eval_fraction=0.3", f"trainer.per_device_eval_batch_size={size}"),
            tmp_path / str(size),
        ).value
        for size in (1, 5, 32)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adamw8bit"])
def test_ratio_1_gives_the_bits_of_plain_lora(
    optimizer: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    run(compose(*tiny_run, f"optimizer={optimizer}", "loraplus=default", "loraplus.ratio=1"), tmp_path / "ratio1")
    run(compose(*tiny_run, f"optimizer={optimizer}", "loraplus=none"), tmp_path / "none")
    one, plain = weights(tmp_path / "ratio1"), weights(tmp_path / "none")
    assert all(torch.equal(one[name], plain[name]) for name in plain)
    assert any(tensor.abs().sum() > 0 for name, tensor in plain.items() if "lora_B" in name)


def test_same_config_gives_the_same_bits(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    from loraplus_hydra import run

    run(compose(*tiny_run, "adapter.lora_dropout=0.2"), tmp_path / "first")
    run(compose(*tiny_run, "adapter.lora_dropout=0.2", "task.samples=0"), tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_failed_job_leaves_its_result(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    from loraplus_hydra import run
    from loraplus_hydra.training.hf_trainer.loraplus_mixin import NotFiniteError

    with pytest.raises(NotFiniteError, match="step 2"):
        run(compose(*tiny_run, "optimizer.lr=1e30", "trainer.max_grad_norm=0"), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"]["type"] == "NotFiniteError"
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("exception", "status", "code"), [("KeyboardInterrupt", "interrupted", 130), ("Terminated", "interrupted", 143)]
)
def test_interrupt_is_recorded_and_ends_with_its_status(
    exception: str,
    status: str,
    code: int,
    cli: Callable[..., Finished],
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loraplus_hydra.io.interrupts import Interrupted
    from loraplus_hydra.runs import job

    def interrupted(*args: Any) -> None:
        raise Interrupted(signal.SIGTERM) if exception == "Terminated" else KeyboardInterrupt

    monkeypatch.setattr(job, "train", interrupted)
    assert cli(*tiny_run, "hydra.run.dir=run").status == code
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == status


def test_main_returns_the_metric_that_a_sweep_optimises(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    finished = cli("-m", *tiny_run, "loraplus.ratio=1,16", "hydra.sweep.dir=sweep")
    assert finished.status == 0, finished.err
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert [result["status"] for result in results] == ["ok", "ok"]
    assert results[0]["config_hash"] != results[1]["config_hash"]
    assert results[0]["metrics"]["eval_loss"] != results[1]["metrics"]["eval_loss"]


def test_failure_before_training_still_tells_seed_and_config(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.runs import job

    def broken(*args: Any, **how: Any) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(job, "prepare", broken)
    with pytest.raises(RuntimeError):
        job.run(compose(*tiny_run, "seed=7"), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["seed"]) == ("failed", 7)
    assert result["error"] == {"type": "RuntimeError", "text": "the disk is on fire"}
    assert len(result["config_hash"]) == 12


def test_peak_memory_is_the_run_s_own(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    first = run(compose(*tiny_run), tmp_path / "first")
    with mmap.mmap(-1, 2**29) as ballast:  # between both runs; the allocator would keep memory that it gave
        for _ in range(2**9):
            ballast.write(bytes(2**20))
    second = run(compose(*tiny_run), tmp_path / "second")
    assert second.peak_memory_bytes < first.peak_memory_bytes + 2**28


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("change", ["loraplus.ratio=1", "seed=0"], ids=["another config", "the same config"])
def test_run_from_python_never_overwrites_another(
    change: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    run(compose(*tiny_run, "trainer.max_steps=2", "trainer.save_steps=1"), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"isn't empty; a run never overwrites another.* resume "):
        run(compose(*tiny_run, "trainer.max_steps=2", "trainer.save_steps=1", change), tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_stopped_run_from_python_is_not_overwritten(
    compose: Callable[..., Any], stopped: Callable[..., None], tiny_run: list[str], tmp_path: Path
) -> None:
    stopped(tmp_path / "run", *tiny_run, "trainer.save_steps=2", at=3)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="isn't empty"):
        run(compose(*tiny_run, "loraplus.ratio=1"), tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_files_of_hydra_and_of_others_are_no_run(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    for name in (".hydra/config.yaml", "train.log", "notes.txt"):
        (tmp_path / "run" / name).write_text("x: 1\n")
    assert run(compose(*tiny_run, "trainer.max_steps=1"), tmp_path / "run").status == "ok"


def test_corrected_config_has_the_folder_of_the_refused_one(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigErrors):
        run(compose(*tiny_run, "optimizer.lr=-1"), tmp_path / "run")
    assert run(compose(*tiny_run, "trainer.max_steps=1"), tmp_path / "run").status == "ok"


def state_of_the_process() -> dict[str, Any]:
    from torch.backends import cudnn

    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
        "environment": dict(os.environ),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("end", ["ok", "error"])
def test_run_leaves_the_process_as_it_was(
    end: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.io.quiet_libraries import quiet_libraries
    from loraplus_hydra.runs import job
    from loraplus_hydra.training.process_state import import_early

    during: dict[str, Any] = {}
    train = job.train

    def watched(*arguments: Any) -> None:
        during.update(state_of_the_process())
        train(*arguments)
        if end == "error":
            raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(job, "train", watched)
    config = compose(*tiny_run, "trainer.max_steps=1", "task.samples=0", "+trainer.full_determinism=true")
    quiet_libraries()  # these two set variables once for the process
    import_early(config)
    before = state_of_the_process()
    with pytest.raises(RuntimeError) if end == "error" else nullcontext():
        job.run(config, tmp_path / "run")
    assert during["deterministic"]
    assert "CUBLAS_WORKSPACE_CONFIG" in during["environment"]
    after = state_of_the_process()
    assert {name for name in before if after[name] != before[name]} == set()
