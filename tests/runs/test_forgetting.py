"""The change of the loss on other text equals that of a loop by hand over transformers and PEFT alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplus_hydra.check import check
from loraplus_hydra.config.identity import run_hash
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.job import run
from tests.conftest import Finished
from tests.support.finished_runs import finished

__all__ = ["finished"]

TEXTS = ["two three four one", "one", "say four four three " * 30, "three two\nsay one"]
Compose = Callable[..., Any]


def by_hand(base: Path, adapter: Path | None, rows: list[tuple[str, str]], limit: int) -> float:
    """The mean loss of a token of prompts and answers; a long text is cut into pieces."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    losses: list[torch.Tensor] = []
    for prompt, answer in rows:
        ids = torch.tensor(tokenizer(prompt + answer)["input_ids"])
        first = len(tokenizer(prompt)["input_ids"]) if prompt else 0
        counted = torch.arange(len(ids)) >= first
        for start in range(0, len(ids), limit):
            part, of_answer = ids[start : start + limit], counted[start : start + limit]
            with torch.no_grad():
                logits = model(input_ids=part[None]).logits[0, :-1]
            each = -logits.log_softmax(-1).gather(1, part[1:, None])[:, 0]
            losses.append(each[of_answer[1:]])
    return torch.cat(losses).double().mean().item()


@pytest.fixture
def other(tmp_path: Path) -> Path:
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="lora"),
        pytest.param(["adapter=pissa"], id="pissa"),
        pytest.param(["model.add_tokens=['<new>']"], id="new tokens"),
        pytest.param(["adapter.bias=lora_only", "model.path=QWEN"], id="bias", marks=pytest.mark.slow),
        pytest.param(
            ["adapter=lora_embeddings", "+adapter.modules_to_save=[lm_head]"],
            id="modules_to_save",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_change_is_that_of_a_loop_by_hand(
    overrides: list[str],
    compose: Compose,
    tiny_run: list[str],
    checkpoints: Callable[[str], Path],
    other: Path,
    tmp_path: Path,
    cli: Callable[..., Finished],
) -> None:
    overrides = [override.replace("QWEN", str(checkpoints("qwen2"))) for override in overrides]
    config = compose(*tiny_run, f"forgetting={other}", "optimizer.lr=2e-2", *overrides)
    folder = tmp_path / "run"
    result = run(config, folder)
    base, rows = Path(config.model.path), [("", text) for text in TEXTS]
    before = by_hand(base, None, rows, 128)
    after = by_hand(base, folder / "adapter", rows, 128)
    expected = {"forgetting_loss_base": before, "forgetting_loss": after, "forgetting": after - before}
    found = {key: result.metrics[key] for key in expected}
    assert found == pytest.approx(expected, abs=2e-5)
    assert abs(after - before) > 1e-3
    assert json.loads((folder / "result.json").read_text())["metrics"] == pytest.approx(result.metrics)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["forgetting"] for line in logged if "forgetting" in line] == [result.metrics["forgetting"]]
    ended = cli("evaluate", str(folder), f"forgetting={other}", "out=metrics.json")
    assert ended.status == 0, ended.err
    written = json.loads(Path("metrics.json").read_text())
    assert {key: written[key] for key in expected} == pytest.approx(expected, abs=2e-5)
    assert "forgetting = " in ended.out


def test_plain_adapter_agrees_with_the_adapter_switched_off(finished: Callable[[str], Path], other: Path) -> None:
    from loraplus_hydra.runs.evaluate import evaluate

    folder = finished("text")  # gpt2, with learned positions
    metrics = evaluate(open_run(str(folder), groups=None), forgetting=str(other))
    base = Path(open_run(str(folder)).config.model.path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter").eval()
    tokenizer, losses = AutoTokenizer.from_pretrained(base), []
    with model.disable_adapter(), torch.no_grad():
        for text in TEXTS:
            for ids in torch.tensor([tokenizer(text)["input_ids"]]).split(128, dim=1):
                each = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
                losses.append((each.item() if ids.shape[1] > 1 else 0.0, ids.shape[1] - 1))
    expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert metrics["forgetting_loss_base"] == pytest.approx(expected, abs=1e-5)


def test_only_answers_to_prompts_count(finished: Callable[[str], Path], tmp_path: Path) -> None:
    from loraplus_hydra.runs.evaluate import evaluate

    file = tmp_path / "asked.csv"
    file.write_text("prompt,completion\nsay one, two three\nand then, the number\n")
    folder = finished("sft")
    metrics = evaluate(open_run(str(folder), groups=None), forgetting=str(file))
    rows = [("say one", " two three"), ("and then", " the number")]
    base = Path(open_run(str(folder)).config.model.path)
    assert metrics["forgetting_loss_base"] == pytest.approx(by_hand(base, None, rows, 128), abs=1e-5)
    assert metrics["forgetting_loss"] == pytest.approx(by_hand(base, folder / "adapter", rows, 128), abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["forgetting=nothing.jsonl"], "forgetting: nothing.jsonl: No such file"),
        (["forgetting=columns.jsonl"], "forgetting: columns.jsonl: "),
        (["forgetting=short.txt"], "forgetting: short.txt has no token whose loss could be measured"),
        (["forgetting=new.txt", "model.add_tokens=['<new>']"], "the base model doesn't know '<new>', a new token"),
        (["forgetting=chat.jsonl"], "the tokenizer has no chat template"),
        (["forgetting=nothing.jsonl", "optimizer.lr=0"], "forgetting: nothing.jsonl"),
    ],
)
def test_rows_that_cannot_be_measured_are_told_before_the_run(
    overrides: list[str], told: str, compose: Compose, tiny_run: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("columns.jsonl").write_text('{"other": "a"}\n')
    Path("short.txt").write_text("s\n")
    Path("new.txt").write_text("say <new> one\n")
    Path("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ConfigErrors) as error:
        check(compose(*tiny_run, *overrides))
    assert told in str(error.value)


def test_classifier_has_no_such_loss(
    finished: Callable[[str], Path], cli: Callable[..., Finished], other: Path
) -> None:
    ended = cli("evaluate", str(finished("label")), f"forgetting={other}")
    assert ended.status == 1
    assert "forgetting: the run's model doesn't predict text; leave it out" in ended.err


def test_key_that_is_not_set_leaves_the_hash(compose: Compose, tiny_run: list[str]) -> None:
    config = compose(*tiny_run)
    without = config.copy()
    del without.forgetting
    assert run_hash(config) == run_hash(without)
    config.forgetting = "other.jsonl"
    assert run_hash(config) != run_hash(without)
