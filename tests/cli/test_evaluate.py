"""`evaluate`: a finished run's own metrics again, and those on other rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.runs.evaluate import evaluate
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.job import run
from loraplus_hydra.runs.load_finished import load_run
from tests.conftest import Finished
from tests.support.finished_runs import NO_PLACE, RUNS, finished
from tests.support.tiny import write_jsonl

__all__ = ["finished"]


@pytest.mark.parametrize("name", RUNS)
def test_run_is_evaluated_again_to_its_own_numbers(name: str, finished: Callable[[str], Path]) -> None:
    folder = finished(name)
    before = sorted(folder.rglob("*"))
    metrics = evaluate(open_run(str(folder), groups=None))
    own = json.loads((folder / "result.json").read_text())["metrics"]
    compared = [
        key for key in own if not any(word in key for word in ("second", "runtime", "time", "epoch", "num_tokens"))
    ]
    assert "eval_loss" in compared
    for key in compared:
        assert metrics[key] == pytest.approx(own[key], abs=1e-6), key
    assert sorted(folder.rglob("*")) == before, "the run's folder stays as it is"


@pytest.mark.parametrize(("start", "step"), [("lora", None), ("pissa", None), ("pissa", "2"), ("existing", None)])
def test_preferences_are_compared_with_the_model_before_training(
    start: str,
    step: str | None,
    tiny_run: list[str],
    compose: Callable[..., Any],
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    asked = [{"prompt": f"say {i} please", "chosen": "it is", "rejected": "no"} for i in range(16)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", asked)
    words = [f"model.path={checkpoints('qwen2')}", "task=dpo", f"data.train={pairs}", "optimizer.lr=2e-2"]
    words += ["trainer.save_steps=2", "trainer.eval_steps=2", "trainer.use_cpu=true"]
    trained = [word for word in tiny_run if not word.startswith(("data.train", "model.path", "task."))] + words
    if start == "existing":
        run(compose(*trained), tmp_path / "first")
    adapter = [f"adapter={start}", *([f"adapter.path={tmp_path}/first"] if start == "existing" else [])]
    run(compose(*trained, *adapter), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (own,) = (line for line in lines if "eval_loss" in line and line["step"] == int(step or 4))
    assert abs(own["eval_rewards/margins"]) > 1e-3, "the model has left its start"
    metrics = evaluate(open_run(str(tmp_path / "run"), groups=None, checkpoint=step))
    for key in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"):
        assert metrics[key] == pytest.approx(own[key], abs=1e-4), key


def test_a_template_that_was_edited_after_training_is_not_used(
    tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "two"}]
    rows = write_jsonl(tmp_path / "turns.jsonl", [{"messages": turns}] * 12)
    template = tmp_path / "turns.jinja"
    template.write_text("{% for turn in messages %}{{ turn.content }} <eos>{% endfor %}")
    words = [f"data.train={rows}", f"+task.args.chat_template_path={template}", "trainer.max_steps=1"]
    ended = cli(*tiny_run, *words, "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    own = json.loads(Path("run/result.json").read_text())["metrics"]["eval_loss"]
    template.write_text("{% for turn in messages %}five six seven {{ turn.content }} <eos>{% endfor %}")
    for _ in ("edited", "gone"):
        ended = cli("evaluate", "run", "out=null")
        assert ended.status == 0, ended.err
        assert f"eval_loss = {own:.6g} " in ended.out
        template.unlink(missing_ok=True)


def test_other_rows_give_their_own_loss(finished: Callable[[str], Path], cli: Callable[..., Finished]) -> None:
    Path("other.jsonl").write_text('{"prompt": "say five", "completion": " seven"}\n')
    ended = cli("evaluate", str(finished("sft")), "data.eval=other.jsonl", "out=metrics.json")
    assert ended.status == 0, ended.err
    metrics = json.loads(Path("metrics.json").read_text())
    model, tokenizer = load_run(open_run(str(finished("sft"))))
    ids = tokenizer("say five seven<eos>", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : len(tokenizer("say five")["input_ids"])] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert f"eval_loss = {metrics['eval_loss']:.6g} (at the end of training: " in ended.out


def test_another_kind_of_data_takes_the_place_of_the_runs(
    finished: Callable[[str], Path], cli: Callable[..., Finished]
) -> None:
    Path("other.csv").write_text("prompt,completion\nsay five, seven\n")
    Path("other.jsonl").write_text('{"prompt": "say five", "completion": " seven"}\n')
    told = [
        cli("evaluate", str(finished("sft")), *words)
        for words in (("data=csv", "data.eval=other.csv"), ("data.eval=other.jsonl", "trainer.use_cpu=true"))
    ]
    assert [ended.status for ended in told] == [0, 0], told[0].err + told[1].err
    assert told[0].out == told[1].out


def test_classifier_meets_other_rows_with_its_own_labels(
    finished: Callable[[str], Path], cli: Callable[..., Finished]
) -> None:
    Path("other.csv").write_text("text,label\nsay one 1,one\nsay two 2,two\n")
    ended = cli("evaluate", str(finished("label")), "data.eval=other.csv", "out=metrics.json")
    assert ended.status == 0, ended.err
    accuracy = json.loads(Path("metrics.json").read_text())["eval_accuracy"]
    model, tokenizer = load_run(open_run(str(finished("label"))))
    with torch.no_grad():
        inputs = tokenizer(["say one 1", "say two 2"], padding=True, return_tensors="pt")
        found = [model.config.id2label[index] for index in model(**inputs).logits.argmax(-1).tolist()]
    assert accuracy == pytest.approx(sum(label == word for label, word in zip(found, ("one", "two"), strict=True)) / 2)
    Path("strange.csv").write_text("text,label\nsay one 1,eleven\n")
    ended = cli("evaluate", str(finished("label")), "data.eval=strange.csv")
    assert ended.status == 1
    assert "eleven" in ended.err
    Path("else.csv").write_text("text,label\nsay one 1,red\nsay two,blue\nsay three,red\n")
    ended = cli("evaluate", str(finished("label")), "data.train=else.csv", "data.eval=else.csv")
    assert ended.status == 1
    assert "the rows have labels that the run doesn't have: blue, red" in ended.err


def test_other_rows_for_a_run_of_the_embedded_ones_need_another_option(
    finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished("sft"), tmp_path / "copied"))
    config = OmegaConf.load(copied / "config.yaml")
    config.data = OmegaConf.load(config_folder() / "data" / "embedded.yaml")
    OmegaConf.save(config, copied / "config.yaml")
    Path("other.jsonl").write_text('{"prompt": "say five", "completion": " seven"}\n')
    ended = cli("evaluate", str(copied), "data.eval=other.jsonl")
    assert ended.status == 1
    assert [line for line in ended.err.splitlines() if line.startswith("  - ")] == [
        "  - data.eval: load takes no argument 'eval'; choose another option: data=jsonl data.eval=..."
    ]
    ended = cli("evaluate", str(copied), "data=jsonl", "data.eval=other.jsonl")
    assert ended.status == 0, ended.err


def test_a_classifier_is_evaluated_on_other_rows_when_its_own_are_gone(
    finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(finished("label"), tmp_path / "copied"))
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("labels.csv", "gone.csv"))
    Path("other.csv").write_text("text,label\nsay one 1,one\n")
    ended = cli("evaluate", str(copied), "data.eval=other.csv")
    assert ended.status == 0, ended.err


@pytest.mark.parametrize("folder", [NO_PLACE])
def test_out_that_cannot_be_written_is_told_before_the_work(
    folder: str, finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplus_hydra.runs.evaluate.load_run", None)
    ended = cli("evaluate", str(finished("sft")), f"out={folder}/metrics.json")
    assert ended.status == 1
    assert f"out: {folder} can't be written" in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.evl=a"], "data.evl: load takes no argument 'evl' (did you mean 'eval'?)"),
        (["data.eval=nothing.jsonl"], "data.eval: nothing.jsonl: No such file"),
        (["data=jsonl", "data.eval=nothing.jsonl"], "data.eval: nothing.jsonl: No such file"),
        (["data=jsonl", "data.eval=[]"], "data.eval: "),
        (["trainer.per_device_eval_batch_sise=2"], "(did you mean 'per_device_eval_batch_size'?)"),
        (["trainer.per_device_eval_batch_size=0"], "trainer.per_device_eval_batch_size: 0 is out of range"),
        (["trainer.learning_rate=1"], "trainer.learning_rate: can't be set here"),
        (["data=jsn"], "data: there is no option 'jsn' (did you mean 'jsonl'?)"),
        (["optimizer.lr=1"], "optimizer.lr: there is no such key"),
        (["data.prompt_column=question"], "rows have no column 'question'"),
        (["harness_tasks=x"], "harness_tasks: without `harness` it has no effect"),
        (["harness_limit=1"], "harness_limit: without `harness` it has no effect"),
        (["harness_batch_size=64"], "harness_batch_size: without `harness` it has no effect"),
        (["harness_chat=true"], "harness_chat: without `harness` it has no effect"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], told: str, finished: Callable[[str], Path], cli: Callable[..., Finished]
) -> None:
    ended = cli("evaluate", str(finished("sft")), *arguments)
    assert ended.status == 1
    assert told in ended.err
    assert "Traceback" not in ended.err


def test_numbers_that_are_not_finite_are_null_in_the_file(
    finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any, **__: Any) -> dict[str, float]:
        return {"eval_loss": math.nan, "eval_perplexity": math.inf, "eval_accuracy": 0.5}

    def refused(word: str) -> None:
        raise ValueError(f"{word} isn't JSON")

    monkeypatch.setattr("loraplus_hydra.runs.evaluate.evaluate_on", measured)
    ended = cli("evaluate", str(finished("sft")), "out=m.json")
    assert ended.status == 0, ended.err
    assert "eval_loss = nan" in ended.out
    written = json.loads(Path("m.json").read_text(), parse_constant=refused)
    assert written == {"eval_loss": None, "eval_perplexity": None, "eval_accuracy": 0.5}


def test_scores_that_are_not_finite_are_null(
    finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"text": "say", "label": "one", "scores": {"one": math.nan, "two": 0.5}}
    monkeypatch.setattr("loraplus_hydra.runs.predict.predict", lambda *_, **__: iter([dict(answer)]))
    run = str(finished("label"))
    assert json.loads(cli("predict", run, "text=say").out) == {"text": "say", "label": "one", "score": None}
    assert cli("predict", run, "text=say", "out=a.jsonl").status == 0
    assert json.loads(Path("a.jsonl").read_text())["scores"] == {"one": None, "two": 0.5}
