"""`export` of folders that are no finished run or not to be trusted, and of results with gaps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraplus_hydra.errors import UserError
from loraplus_hydra.runs.export import export
from loraplus_hydra.runs.finished import open_run
from tests.conftest import Finished
from tests.support.finished_runs import NO_PLACE


@pytest.fixture
def copied(runs: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(runs("lora"), tmp_path / "copied")
    return tmp_path / "copied"


def broken_run(copied: Path, kind: str) -> Path:
    if kind == "no such folder":
        return copied / "nothing"
    if kind == "no config":
        (copied / "config.yaml").unlink()
    elif kind == "a sweep":
        (copied / "config.yaml").rename(copied / "adapter" / "config.yaml")
    elif kind == "unfinished":
        (copied / "result.json").unlink()
    elif kind == "broken result":
        (copied / "result.json").write_text('{"status": "ok"')
    elif kind == "failed":
        failed = {"status": "failed", "error": {"type": "OutOfMemoryError", "text": "out of memory"}}
        (copied / "result.json").write_text(json.dumps(failed))
    elif kind == "no adapter":
        shutil.rmtree(copied / "adapter")
    elif kind == "pickled adapter":
        weights = copied / "adapter" / "adapter_model.safetensors"
        torch.save(load_file(weights), copied / "adapter" / "adapter_model.bin")
        weights.unlink()
    elif kind == "broken config":
        (copied / "config.yaml").write_text("model: [")
    elif kind == "unknown keys":
        with (copied / "config.yaml").open("a") as file:
            file.write("further: 1\n")
    elif kind == "other weights":
        shutil.copy(copied / "adapter" / "adapter_model.safetensors", copied / "kept")
        narrower = {name: t[:, :-1].contiguous() for name, t in load_file(copied / "kept").items()}
        from safetensors.torch import save_file

        save_file(narrower, copied / "adapter" / "adapter_model.safetensors")
    return copied


def test_card_leaves_out_what_the_result_does_not_have(copied: Path, tmp_path: Path) -> None:
    file = copied / "result.json"
    needed = {name: value for name, value in json.loads(file.read_text()).items() if name in ("status", "metric")}
    file.write_text(json.dumps({**needed, "metrics": {"eval_loss": 1.5}, "metrics_before": {}, "seed": "x"}))
    card = (export(open_run(str(copied)), tmp_path / "bare", merge=False) / "README.md").read_text()
    assert "| eval_loss |  | 1.5 |" in card
    assert "Hash of the config: `not recorded`" in card
    assert card.rstrip().endswith("not recorded")
    assert " steps" not in card.partition("## Results")[2].partition("## Config")[0]
    file.write_text(json.dumps({**needed, "metrics": {}, "metrics_before": {}, "samples": [{"prompt": "say"}]}))
    card = (export(open_run(str(copied)), tmp_path / "one", merge=False) / "README.md").read_text()
    assert "| say |  |  |  |" in card


@pytest.mark.parametrize("content", [None, "[", '[{"group": "groupA"}]', "[1]", '[{"group": "a", "lr": "x"}]'])
def test_rates_that_cannot_be_read_are_told_before_the_weights_load(
    content: str | None, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplus_hydra.runs.export.load_run", None)
    (copied / "param_groups.json").unlink()
    if content is not None:
        (copied / "param_groups.json").write_text(content)
    with pytest.raises(UserError, match=r"param_groups\.json"):
        export(open_run(str(copied)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["export"], ["predict", "text=say"], ["evaluate"]])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no such folder", "run: there is no folder"),
        ("no config", "is not a run's folder"),
        ("a sweep", "it contains the runs adapter; give one of them"),
        ("unfinished", "hasn't finished: there is no result.json"),
        ("broken result", "result.json can't be read"),
        ("failed", "ended as 'failed' (OutOfMemoryError: out of memory)"),
        ("no adapter", "there is no adapter in"),
        ("pickled adapter", "only safetensors are read"),
        ("broken config", "config.yaml can't be read"),
        ("unknown keys", "further: there is no such key"),
        ("other weights", "doesn't fit the model"),
    ],
)
def test_folder_that_is_no_finished_run_is_refused(
    command: list[str], kind: str, told: str, copied: Path, cli: Callable[..., Finished]
) -> None:
    folder = broken_run(copied, kind)
    before = sorted(copied.rglob("*")) if copied.exists() else []
    ended = cli(command[0], str(folder), *command[1:], "allow_changed_inputs=true")
    assert ended.status == 1
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert sorted(copied.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize("command", [["export"], ["predict", "text=say"], ["evaluate"]])
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("auto_class: transformers.AutoModelForCausalLM", "auto_class: os.system", "task.auto_class"),
        ("_target_: peft.LoraConfig", "_target_: torch.load", "adapter._target_"),
        ("trust_remote_code: false", "trust_remote_code: true", "trust_remote_code: the run's model contains Python"),
        ("dtype: float32", "dtype: {_target_: os.system}", "model.dtype"),
    ],
)
def test_hostile_config_is_refused(
    command: list[str], old: str, new: str, told: str, copied: Path, cli: Callable[..., Finished]
) -> None:
    text = (copied / "config.yaml").read_text()
    assert old in text
    (copied / "config.yaml").write_text(text.replace(old, new))
    ended = cli(command[0], str(copied), *command[1:])
    assert ended.status == 1
    assert told in ended.err
    assert not (copied / "export").exists()


@pytest.mark.parametrize("folder", [NO_PLACE])
def test_folder_that_cannot_be_made_is_told_before_the_work(
    folder: str, runs: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplus_hydra.runs.export.load_run", None)
    ended = cli("export", str(runs("lora")), f"to={folder}/export/model")
    assert ended.status == 1
    assert f"to: {folder} can't be written" in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "run: no run's folder is given"),
        (["dtype=int8"], "run: no run's folder is given"),
        (["RUN", "dtype=int8"], "dtype: 'int8' is not a dtype; use one of float32, bfloat16, float16"),
        (["RUN", "dtype=bfloat16", "merge=false"], "dtype: an adapter keeps the dtype"),
        (["RUN", "mrge=false"], "mrge: there is no such key (did you mean 'merge'?)"),
        (["RUN", "merge=perhaps"], "merge: Value 'perhaps' is not a valid bool"),
        (["RUN", "model.pth=x"], "model.pth: there is no such key (did you mean 'path'?)"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], told: str, runs: Callable[[str], Path], cli: Callable[..., Finished]
) -> None:
    ended = cli("export", *[str(runs("lora")) if word == "RUN" else word for word in arguments])
    assert ended.status == 1
    assert told in ended.err
