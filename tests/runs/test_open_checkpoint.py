"""A checkpoint of a run, stopped or not, is opened by `predict`, `evaluate` and `export`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loraplus_hydra.runs.export import export
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.job import run
from loraplus_hydra.runs.load_finished import load_run
from tests.conftest import Finished
from tests.support.tiny import bert_folder

__all__ = ["bert_folder"]

TOKENS = torch.arange(3, 51).reshape(4, 12)
COMMON = ("scheduler=constant", "optimizer.lr=5e-3", "task.samples=0", "trainer.save_steps=3", "trainer.eval_steps=3")
KINDS = {"lora": [], "pissa": ["adapter=pissa"], "new tokens": ["model.add_tokens=['<call>','<answer>']"]}


@dataclass(frozen=True)
class Pair:
    """A run that ended at step 3, and one of six steps that was stopped after step 4; their first steps are equal."""

    ended: Path
    stopped: Path


@pytest.fixture
def pair(
    tiny_run: list[str], compose: Callable[..., Any], stopped: Callable[..., None], tmp_path: Path
) -> Callable[..., Pair]:
    def trained(*overrides: str) -> Pair:
        words = [*tiny_run, *COMMON, *overrides]
        run(compose(*words, "trainer.max_steps=3"), tmp_path / "ended")
        stopped(tmp_path / "stopped", *words, "trainer.max_steps=6", at=4)
        return Pair(tmp_path / "ended", tmp_path / "stopped")

    return trained


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_the_model_of_its_step(kind: str, pair: Callable[..., Pair], tmp_path: Path) -> None:
    runs = pair(*KINDS[kind])
    expected = logits(load_run(open_run(str(runs.ended)))[0])
    opened = open_run(str(runs.stopped), checkpoint="3")
    torch.testing.assert_close(logits(load_run(opened)[0]), expected, atol=1e-5, rtol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(export(opened, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    folder = export(opened, tmp_path / "adapter", merge=False)
    base = AutoModelForCausalLM.from_pretrained(opened.config.model.path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder)), expected, atol=1e-4, rtol=1e-4)
    assert "This is the checkpoint of step 3" in (folder / "README.md").read_text()
    assert not {"run_state.json", "trainer_state.json", "manifest.json"} & {file.name for file in folder.iterdir()}


def test_a_stopped_run_is_tried_from_the_command_line(pair: Callable[..., Pair], cli: Callable[..., Finished]) -> None:
    runs = pair()
    refused = cli("predict", str(runs.stopped), "text=say")
    assert refused.status == 1
    assert (
        "ended as 'interrupted'; resume it, or open a checkpoint: checkpoint=newest (the steps are 3, 4)" in refused.err
    )
    before = sorted(runs.stopped.rglob("*"))
    assert cli("predict", str(runs.stopped), "checkpoint=newest", "text=say", "max_new_tokens=2").status == 0
    evaluated = cli("evaluate", str(runs.stopped), "checkpoint=3")
    loss = json.loads((runs.ended / "result.json").read_text())["metrics"]["eval_loss"]
    assert f"eval_loss = {loss:.6g} (in training at step 3: {loss:.6g})" in evaluated.out
    assert sorted(runs.stopped.rglob("*")) == before, "the run's folder stays as it is"
    assert cli("export", str(runs.stopped), "checkpoint=newest").status == 0
    assert (runs.stopped / "export" / "model-of-step-4" / "model.safetensors").is_file()
    shutil.move(runs.stopped, "elsewhere")
    assert open_run("elsewhere", checkpoint="newest").step == 4


MISSING = {
    "7": "has no complete checkpoint '7'; use newest, or one of the steps 3",
    "best": "has no complete checkpoint 'best'; use newest, or one of the steps 3",
    "../x": "has no complete checkpoint '../x'",
    "3": "3 is incomplete: adapter_model.safetensors",
    "newest": "has no complete checkpoint; use newest, or one of the steps 3",
}


def test_a_checkpoint_that_is_missing_or_broken_is_an_error(
    tiny_run: list[str], compose: Any, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    run(compose(*tiny_run, *COMMON, "trainer.max_steps=3"), tmp_path / "run")
    with (tmp_path / "run/checkpoints/checkpoint-3/adapter_model.safetensors").open("ab") as file:
        file.write(b"more")
    for checkpoint, message in MISSING.items():
        ended = cli("export", str(tmp_path / "run"), f"checkpoint={checkpoint}", "to=out")
        assert ended.status == 1
        assert "checkpoint: " in ended.err
        assert message in ended.err
        assert not Path("out").exists()


def test_a_killed_classifier_is_exported_with_its_labels(
    compose: Callable[..., Any],
    stopped: Callable[..., None],
    bert_folder: Path,
    cli: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As where the variable CI is set: the answer stands alone on stdout all the same.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = "".join(f"the fox {word} {i},{word}\n" for i in range(8) for word in ("dog", "cat", "bird"))
    (tmp_path / "labels.csv").write_text("text,label\n" + text)
    words = ["task=classification", "data=csv", f"data.train={tmp_path / 'labels.csv'}", "model=hub"]
    words += [f"model.path={bert_folder}", "scheduler=constant", "trainer.per_device_train_batch_size=4"]
    stopped(tmp_path / "run", *words, "trainer.max_steps=6", at=2)
    (tmp_path / "run/result.json").unlink()  # a run that was killed has none
    ended = cli("predict", str(tmp_path / "run"), "text='the fox'")
    assert "hasn't finished: there is no result.json; resume it, or open a checkpoint: checkpoint=newest" in ended.err
    assert cli("export", str(tmp_path / "run"), "checkpoint=newest", "to=out").status == 0
    exported = AutoModelForSequenceClassification.from_pretrained("out")
    assert exported.config.id2label == {0: "bird", 1: "cat", 2: "dog"}
    tokens = AutoTokenizer.from_pretrained("out")("the fox", return_tensors="pt")
    with torch.no_grad():
        scores = exported.eval()(**tokens).logits.softmax(-1)[0].tolist()
    predicted = json.loads(
        cli("predict", str(tmp_path / "run"), "checkpoint=newest", "text='the fox'", "scores=true").out
    )
    assert list(predicted["scores"].values()) == pytest.approx(scores, abs=1e-5)
