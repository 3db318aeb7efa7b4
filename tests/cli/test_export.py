"""`export`: it gives the run's logits, plain libraries load it, and its card tells the run's numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loraplus_hydra import run
from loraplus_hydra.runs import model_card
from loraplus_hydra.runs.export import export
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.runs.model_card import card
from tests.cli.conftest import CLASSIFIERS, ROUNDED, RUNS
from tests.conftest import Finished

TOKENS = torch.arange(3, 51).reshape(4, 12)

IN_EACH_RUN = (
    *("lora", "dora", "pissa", "adalora", "vera", "embeddings, tied", "new tokens, untied", "biases"),
    *("embeddings and output, tied", "saved output, untied", "nf4", "classifier"),
)


def some(names: Iterable[str]) -> list[Any]:
    """Those of `names` that are in IN_EACH_RUN, and the others as slow."""
    return [pytest.param(name, marks=[] if name in IN_EACH_RUN else pytest.mark.slow) for name in names]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", some(RUNS))
def test_merged_model_gives_the_runs_logits(name: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    finished = open_run(str(runs(name)))
    model, tokenizer = load_run(finished)
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 1e-4
    folder = export(finished, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(exported), expected, atol=2e-5, rtol=1e-4)
    assert "the merged model's logits differ by at most" in (folder / "README.md").read_text()
    assert not any("lora" in key for key in exported.state_dict())
    assert exported.config.use_cache
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")) == [
        ".safetensors"
    ]


@pytest.mark.parametrize("name", some(name for name in RUNS if name != "nf4"))
def test_exported_adapter_is_loaded_by_plain_peft(name: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    finished = open_run(str(runs(name)))
    expected = logits(load_run(finished)[0])
    folder = export(finished, tmp_path / "adapter", merge=False)
    base = AutoModelForCausalLM.from_pretrained(finished.config.model.path)
    if "tokens" in name:
        base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)), mean_resizing=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), expected)


def test_classifier_is_taken_away_with_its_labels(runs: Callable[[str], Path], tmp_path: Path) -> None:
    finished = open_run(str(runs("classifier")))
    expected = logits(load_run(finished)[0])
    merged = AutoModelForSequenceClassification.from_pretrained(export(finished, tmp_path / "model"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    assert sorted(merged.config.id2label.values()) == ["one", "three", "two"]
    adapter = export(finished, tmp_path / "adapter", merge=False)
    base = AutoModelForSequenceClassification.from_pretrained(
        finished.config.model.path, num_labels=3, ignore_mismatched_sizes=True
    )
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter)), expected)


def test_weights_come_in_the_dtype_that_is_asked_for(runs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = export(open_run(str(runs("lora"))), tmp_path / "model", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype is torch.bfloat16


@pytest.mark.parametrize("name", ROUNDED)
def test_update_is_exact_in_a_wider_dtype_than_the_runs(name: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    finished = open_run(str(runs(name)))
    exported = load_file(export(finished, tmp_path / "model", dtype="float32") / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    adapter = {
        name: tensor.float() for name, tensor in load_file(finished.adapter / "adapter_model.safetensors").items()
    }
    config = json.loads((finished.adapter / "adapter_config.json").read_text())
    base = load_file(Path(finished.config.model.path) / "model.safetensors")
    factors = {key: tensor for key, tensor in adapter.items() if key.endswith("lora_A.weight")}
    assert factors
    for key, a in factors.items():
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = config["lora_alpha"] / config["r"] * adapter[key.replace("lora_A", "lora_B")] @ a
        weight = base[f"{layer}.weight"].bfloat16().float()  # as the run loaded it
        torch.testing.assert_close(exported[f"{layer}.weight"], weight + update, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("merged", [True, False])
def test_card_tells_the_runs_own_numbers(merged: bool, runs: Callable[[str], Path], tmp_path: Path) -> None:
    source = runs("lora")
    folder = export(open_run(str(source)), tmp_path / "out", merge=merged)
    card = (folder / "README.md").read_text()
    result = json.loads((source / "result.json").read_text())
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line[:1] == "|"]
    table = {line[0]: line[1:] for line in cells}
    assert [float(cell) for cell in table["eval_loss"]] == [
        result["metrics_before"]["eval_loss"],
        result["metrics"]["eval_loss"],
    ]
    assert float(table["train_loss (mean over the steps)"][1]) == result["train_loss"]
    for number in (result["steps"], result["trained_parameters"], result["total_parameters"], result["config_hash"]):
        assert str(number) in card
    groups = json.loads((source / "param_groups.json").read_text())
    for group in ("groupA", "groupB"):
        mine = [row for row in groups if row["group"] == group]
        numbers = sum(torch.Size(row["shape"]).numel() for row in mine)
        lr, decay, *rest = table[group]
        assert (float(lr), float(decay)) == (mine[0]["lr"], mine[0]["weight_decay"])
        assert [int(cell) for cell in rest] == [len(mine), numbers]
    assert "ratio: 8" in card, "the LoRA+ settings of the config"
    assert f"library_name: {'transformers' if merged else 'peft'}" in card
    assert str(source.parent.parent) not in card, "no folder of this machine"


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", some(["lora", "new tokens, tied", "new tokens, untied", "nf4", *CLASSIFIERS]))
def test_card_loads_and_runs_the_export(
    name: str,
    merged: bool,
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished = open_run(str(runs(name)))
    expected = logits(load_run(finished)[0])
    folder = export(finished, tmp_path / "out", merge=merged)
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(runs(name).parent)  # the card names the last part of a local base
    names: dict[str, Any] = {}
    capsys.readouterr()  # of the run, which may have been trained just now
    exec(code.replace("<this folder>", str(folder)), names)
    rounding = 1e-2 if "nf4" in name and not merged else 2e-5  # bitsandbytes alone packs weights anew on some CPUs
    torch.testing.assert_close(logits(names["model"]), expected, atol=rounding, rtol=1e-4)
    assert len(names["tokenizer"]) == len(AutoTokenizer.from_pretrained(folder))
    if name in CLASSIFIERS:
        assert set(eval(capsys.readouterr().out)) == {"one", "two", "three"}


def test_card_loads_the_revision_that_was_trained(runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    finished = open_run(str(runs("lora")))
    finished.config.model.revision = "v1.0"
    code = card(finished, merged=False).partition("```python\n")[2].partition("```")[0]
    asked: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        asked.append((path, options.get("revision")))
        raise InterruptedError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(InterruptedError):
        exec(code, {})
    assert asked == [(Path(finished.config.model.path).name, "v1.0")]


def test_export_by_the_command_line(runs: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path) -> None:
    source = tmp_path / "copy"
    shutil.copytree(runs("lora"), source)
    ended = cli("export", str(source))
    assert ended.status == 0, ended.err
    assert (source / "export" / "model" / "model.safetensors").is_file()
    assert str(source / "export" / "model") in ended.out
    assert "the merged model's logits differ by at most" in ended.out
    assert cli("export", str(source), "merge=false", "to=there").status == 0
    assert Path("there/adapter_model.safetensors").is_file()
    again = cli("export", str(source), "to=there")
    assert again.status == 1
    assert "to: there isn't empty" in again.err
    assert not Path("there/model.safetensors").exists()
    Path("empty").mkdir()
    assert cli("export", str(source), "to=empty").status == 0


def test_a_model_that_has_moved_is_named_again(runs: Callable[[str], Path], cli: Any, tmp_path: Path) -> None:
    source = tmp_path / "copy"
    shutil.copytree(runs("lora").parent, source)
    config = source / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(runs("lora").parent / "base"), "/nowhere/base"))
    ended = cli("export", str(source / "run"), "to=out")
    assert ended.status == 1
    assert "model.path: " in ended.err
    assert not Path("out").exists()
    assert cli("export", str(source / "run"), "to=out", f"model.path={source / 'base'}").status == 0


def test_nothing_is_left_of_an_export_that_failed(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loraplus_hydra.runs.export as module

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_card", broken)
    with pytest.raises(OSError, match="no space"):
        export(open_run(str(runs("lora"))), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_cannot_be_merged_says_so(tmp_path: Path, tiny_run: list[str], compose: Any, cli: Any) -> None:
    overrides = ["adapter._target_=peft.PromptTuningConfig", "+adapter.num_virtual_tokens=4", "loraplus=none"]
    removed = ("path", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights")
    overrides += [f"~adapter.{name}" for name in removed if name != "path"]
    run(compose(*tiny_run, *overrides, "task.samples=0"), tmp_path / "run")
    ended = cli("export", str(tmp_path / "run"), f"to={tmp_path / 'out'}")
    assert ended.status == 1
    assert "use merge=false" in ended.err
    assert not (tmp_path / "out").exists()
    assert cli("export", str(tmp_path / "run"), f"to={tmp_path / 'out'}", "merge=false").status == 0


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("https://alice:s3cret@mlflow.example.com/x", "https://mlflow.example.com/x"),
        ({"hub": "https://alice:p@ss@host"}, {"hub": "https://host"}),
        ("postgresql://alice:s3cret@db/runs", "postgresql://db/runs"),
        ("sqlite:////home/alice/x.db", "sqlite:x.db"),
        ("file:///home/alice/runs", "file:runs"),
        ("/home/alice/rows.jsonl", "rows.jsonl"),
        ("pkg://loraplus_hydra.models/embedded", "pkg://loraplus_hydra.models/embedded"),
        ({"a": ["~/rows.csv", 1]}, {"a": ["rows.csv", 1]}),
    ],
)
def test_a_card_has_no_credentials_and_no_local_paths(value: Any, published: Any) -> None:
    assert model_card._published(value) == published
