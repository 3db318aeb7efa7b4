"""Runs under the lean forward: the numbers of the plain one, and the plain one where the lean one can't be had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.training.hf_trainer.loraplus_mixin import NotFiniteError
from loraplus_hydra.training.lean.forward import LeanForward
from tests.support.forking import lines
from tests.support.lean import assert_equal_within

Compose = Callable[..., Any]
slow = pytest.mark.slow


def both(compose: Compose, folder: Path, *overrides: str) -> tuple[list[Any], list[Any]]:
    for forward in ("lean", "plain"):
        run(compose(*overrides, f"trainer.forward={forward}"), folder / forward)
    return lines(folder / "lean"), lines(folder / "plain")


@pytest.mark.parametrize(
    "changes",
    [
        ["trainer.gradient_accumulation_steps=3", "trainer.per_device_train_batch_size=2", "scheduler=cosine"],
        pytest.param(["adapter.r=3", "scheduler=constant"], marks=slow),
        pytest.param(
            ["task.args.completion_only_loss=false", "adapter=rslora", "trainer.max_grad_norm=0.05"], marks=slow
        ),
    ],
)
def test_forty_steps_have_the_plain_forward_s_numbers(
    compose: Compose, tiny_run: list[str], uneven: list[str], tmp_path: Path, changes: list[str], reports: list[str]
) -> None:
    lean, plain = both(compose, tmp_path, *tiny_run, *uneven, *changes, "trainer.max_steps=40")

    assert reports == ["    Forward pass: lean, without padding (trainer.forward)"]
    assert len(lean) == len(plain) > 40
    for one, other in zip(lean, plain, strict=True):
        norms = one.pop("norms", {}), other.pop("norms", {})
        assert_equal_within(one, other, 1e-6)
        assert_equal_within(*norms, 1e-4)  # Adam divides small differences of small gradients by their own size


@pytest.mark.parametrize(
    "changes",
    [
        ["quantization=nf4"],
        pytest.param(["quantization=int8"], marks=slow),
        pytest.param(["adapter=dora"], marks=slow),
        pytest.param(["adapter=pissa"], marks=slow),
        pytest.param(["adapter=lora_embeddings"], marks=slow),
        pytest.param(["+adapter.modules_to_save=[embed_tokens]"], marks=slow),
    ],
)
def test_other_bases_and_adapters_have_the_plain_forward_s_numbers(
    compose: Compose, tiny_run: list[str], uneven: list[str], tmp_path: Path, changes: list[str], reports: list[str]
) -> None:
    lean, plain = both(compose, tmp_path, *tiny_run, *uneven, *changes)

    assert len(reports) == 1
    assert "lean" in reports[0]
    for one, other in zip(lean, plain, strict=True):
        norms = one.pop("norms", {}), other.pop("norms", {})
        assert_equal_within(one, other, 2e-6)
        assert_equal_within(*norms, 1e-3)


@pytest.mark.parametrize("changes", [["model.dtype=bfloat16"], pytest.param(["trainer.bf16=true"], marks=slow)])
def test_bfloat16_is_as_close_as_it_is_exact(
    compose: Compose, tiny_run: list[str], uneven: list[str], tmp_path: Path, changes: list[str], reports: list[str]
) -> None:
    lean, plain = both(compose, tmp_path, *tiny_run, *uneven, *changes)

    assert "lean" in reports[0]
    assert len(reports) == 1
    assert lean[-1]["eval_loss"] == pytest.approx(plain[-1]["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("batch_size", [4, pytest.param(1, marks=slow)])
def test_text_has_the_plain_forward_s_numbers(
    compose: Compose, llama_folder: Path, tmp_path: Path, batch_size: int, reports: list[str]
) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 120, encoding="utf-8")
    overrides = [
        *("task=text", "task.block_size=32", "task.samples=0", "data=text", f"data.train={tmp_path / 'book.txt'}"),
        *("model=hub", f"model.path={llama_folder}", "trainer.max_steps=8", "trainer.logging_steps=1"),
        *(f"trainer.per_device_train_batch_size={batch_size}", "optimizer.lr=1e-4", "trainer.use_cpu=true"),
    ]

    lean, plain = both(compose, tmp_path, *overrides)

    assert "lean" in reports[0]
    for one, other in zip(lean, plain, strict=True):
        one.pop("norms", None), other.pop("norms", None)
        assert_equal_within(one, other, 1e-6)


@pytest.fixture
def classify(tmp_path: Path) -> list[str]:
    path = tmp_path / "rows.csv"
    words = ("the quick brown fox", "what is the number", "a card has not arrived and a payment failed", "say")
    lines = [f'"{words[i % 4]} {words[i % 3]}",{"abc"[i % 3]}' for i in range(40)]
    path.write_text("\n".join(["text,category", *lines]) + "\n", encoding="utf-8")
    return [
        *("task=classification", "data=csv", f"data.train={path}", "data.label_column=category", "model=hub"),
        *("trainer.max_steps=8", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4"),
        *("optimizer.lr=1e-4", "trainer.use_cpu=true"),
    ]


@pytest.mark.parametrize(
    "architecture", ["bert", pytest.param("llama", marks=slow), pytest.param("roberta", marks=slow)]
)
def test_classification_has_the_plain_forward_s_numbers(
    compose: Compose, classify: list[str], tmp_path: Path, architecture: str, reports: list[str]
) -> None:
    from tests.support.architectures import checkpoint

    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if architecture != "llama" else {}
    (tmp_path / "model").mkdir()
    model = checkpoint(architecture, tmp_path / "model", **off)

    lean, plain = both(compose, tmp_path, *classify, f"model.path={model}")

    assert "lean" in reports[0]
    assert len(reports) == 1
    for one, other in zip(lean, plain, strict=True):
        one.pop("norms", None), other.pop("norms", None)
        assert_equal_within(one, other, 1e-6)


def test_dropout_of_model_and_adapter_trains(
    compose: Compose, classify: list[str], bert_folder: Path, tmp_path: Path, reports: list[str]
) -> None:
    overrides = [*classify, f"model.path={bert_folder}", "adapter.lora_dropout=0.2"]

    lean, plain = both(compose, tmp_path, *overrides)
    run(compose(*overrides, "trainer.forward=lean"), tmp_path / "again")

    assert lines(tmp_path / "again") == lean
    assert lean[-1]["eval_loss"] == pytest.approx(plain[-1]["eval_loss"], rel=0.05)
    assert lean[1]["loss"] != plain[1]["loss"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["trainer.activation_checkpointing=true"], "recomputed"),
        pytest.param(["+trainer.label_smoothing_factor=0.1"], "label smoothing", marks=slow),
        pytest.param(["task.args.packing=true"], "packed", marks=slow),
        pytest.param(["+task.args.padding_free=true", "task.args.max_length=null"], "packed", marks=slow),
        pytest.param(["+trainer.neftune_noise_alpha=5"], "NEFTune", marks=slow),
        pytest.param(["adapter=adalora", "adapter.target_r=2"], "AdaLoraConfig", marks=slow),
        pytest.param(["+adapter.modules_to_save=[lm_head]"], "output layer", marks=slow),
    ],
)
@pytest.mark.parametrize("forward", ["auto", pytest.param("lean", marks=slow)])
def test_what_is_not_eligible_trains_as_before_and_reports_why(
    compose: Compose,
    tiny_run: list[str],
    tmp_path: Path,
    changes: list[str],
    reason: str,
    forward: str,
    reports: list[str],
) -> None:
    shared = [*tiny_run, "trainer.max_steps=2", "task.samples=0", "trainer.use_cpu=true", *changes]
    run(compose(*shared, f"trainer.forward={forward}"), tmp_path / "one")
    run(compose(*shared, "trainer.forward=plain"), tmp_path / "plain")

    assert len(reports) == 1
    assert reports[0].startswith("    Forward pass: plain, because ")
    assert reason in reports[0]
    assert lines(tmp_path / "one") == lines(tmp_path / "plain")


def test_preference_tasks_stay_plain(compose: Compose, llama_folder: Path, tmp_path: Path, reports: list[str]) -> None:
    rows = tmp_path / "pairs.jsonl"
    row = {"prompt": "say", "chosen": " the fox", "rejected": " the dog"}
    rows.write_text((json.dumps(row) + "\n") * 12, encoding="utf-8")

    run(
        compose(
            *("task=dpo", "data=jsonl", f"data.train={rows}", "model=hub", f"model.path={llama_folder}"),
            *("trainer.max_steps=1", "trainer.per_device_train_batch_size=2", "task.samples=0"),
            "trainer.forward=auto",
        ),
        tmp_path / "run",
    )

    assert reports == ["    Forward pass: plain, because DPOTrainer computes its own loss"]


def test_the_default_is_lean_on_a_cpu(
    compose: Compose, tiny_run: list[str], tmp_path: Path, reports: list[str]
) -> None:
    run(compose(*tiny_run, "trainer.max_steps=1", "trainer.use_cpu=true"), tmp_path / "run")

    assert reports == ["    Forward pass: lean, without padding (trainer.forward)"]


def test_a_model_that_is_different_runs_plain_after_its_first_batch(
    compose: Compose, tiny_run: list[str], tmp_path: Path, reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attention has a bias that transformers' attention interface does not show."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    own = LlamaAttention.forward

    def biased(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = own(self, hidden_states, *args, **kwargs)
        return out + 0.1 * hidden_states.cumsum(1), weights

    monkeypatch.setattr(LlamaAttention, "forward", biased)
    lean, plain = both(compose, tmp_path, *tiny_run, "trainer.use_cpu=true")

    assert len(reports) == 1
    assert "Forward pass: plain, because the outputs" in reports[0]
    assert "differ by" in reports[0]
    assert lean == plain


def test_a_batch_beyond_the_window_runs_by_the_model_s_own_attention(
    compose: Compose, tiny_run: list[str], uneven: list[str], tmp_path: Path, reports: list[str]
) -> None:
    from tests.support.architectures import checkpoint

    (tmp_path / "model").mkdir()
    model = checkpoint("mistral", tmp_path / "model", sliding_window=24)

    lean, plain = both(compose, tmp_path, *tiny_run, *uneven, f"model.path={model}")

    assert sorted(reports) == [
        "    Forward pass: lean, without padding (trainer.forward)",
        "    Forward pass: plain for some batches, because a row is longer than the attention's window of 24 tokens",
    ]
    for one, other in zip(lean, plain, strict=True):
        one.pop("norms", None), other.pop("norms", None)
        assert_equal_within(one, other, 2e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_row(
    compose: Compose, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LeanForward.fused_output

    def spoiled(self: LeanForward, batch: Any) -> Any:
        output = own(self, batch)
        return output if not self.model.training else _with_nan(output)

    monkeypatch.setattr(LeanForward, "fused_output", spoiled)

    with pytest.raises(NotFiniteError, match=r"the loss is nan at step 1, in the batch that begins 'say"):
        run(compose(*tiny_run, "trainer.forward=lean"), tmp_path / "run")


def _with_nan(output: Any) -> Any:
    output["log_probs"] = output.log_probs * float("nan")
    return output


def test_a_nan_in_the_weights_stops_the_run_as_under_the_plain_forward(
    compose: Compose, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    own = LlamaModel.forward

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        if self.training:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    monkeypatch.setattr(LlamaModel, "forward", spoiled)
    texts = []
    for forward in ("lean", "plain"):
        with pytest.raises(NotFiniteError) as error:
            run(compose(*tiny_run, f"trainer.forward={forward}"), tmp_path / forward)
        texts.append(str(error.value))

    assert texts[0] == texts[1]


def test_answers_and_the_stored_adapter_are_those_of_the_plain_forward(
    compose: Compose, tiny_run: list[str], tmp_path: Path
) -> None:
    both(compose, tmp_path, *tiny_run)

    lean, plain = (json.loads((tmp_path / each / "result.json").read_text()) for each in ("lean", "plain"))
    assert lean["samples"] == plain["samples"]
    assert sorted(path.name for path in (tmp_path / "lean" / "adapter").iterdir()) == sorted(
        path.name for path in (tmp_path / "plain" / "adapter").iterdir()
    )
