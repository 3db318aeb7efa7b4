"""Untrusted model folders and tokenizers: pickles, code and broken files are refused, and nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.support.finished_runs import finished
from tests.support.hostile import canary, pickled, refused, run, truncated

__all__ = ["canary", "finished", "run"]


def spoilt_model(kind: str, folder: Path, canary: Path) -> None:
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    code = f"import os\nos.system('touch {canary}')\n"
    if kind == "a pickle alone":
        weights.unlink()
        pickled(folder / "pytorch_model.bin", canary)
    elif kind == "a pickle by another name":
        pickled(weights, canary)
    elif kind == "cut off":
        truncated(weights, canary)
    elif kind in ("index out of the folder", "index of pickles"):
        name = "../model.safetensors" if kind == "index out of the folder" else "pytorch_model.bin"
        pickled(folder / "pytorch_model.bin", canary)
        weights.rename(folder.parent / "model.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "index that is none":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    elif kind == "an adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../elsewhere"}))
    elif kind == "model code":
        (folder / "payload.py").write_text(code)
        config |= {"model_type": "novel", "auto_map": {"AutoConfig": "payload.Config", "AutoModel": "payload.Model"}}
    elif kind == "tokenizer code":
        (folder / "payload.py").write_text(code)
        settings = {"tokenizer_class": "Novel", "auto_map": {"AutoTokenizer": ["payload.Novel", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config["model_type"] = "novel"
    elif kind == "a kernel from a hub":
        config["attn_implementation"] = "somebody/kernels"
    elif kind == "sizes that are text":
        config["hidden_size"] = "large"
    elif kind == "config that is a list":
        config = []
    elif kind == "config nested deeply":
        (folder / "config.json").write_text("[" * 100_000)
        return
    (folder / "config.json").write_text(json.dumps(config))


MODELS = {
    "a pickle alone": "only safetensors are read",
    "a pickle by another name": "only safetensors are read",
    "cut off": "only safetensors are read",
    "index out of the folder": "not a file of the folder",
    "index of pickles": "only safetensors are read",
    "index that is none": "index.json can't be read",
    "an adapter": "is an adapter's folder",
    "model code": "model.trust_remote_code=true",
    "tokenizer code": "model.path",
    "a kernel from a hub": "code from a hub",
    "sizes that are text": "model.path",
    "config that is a list": "model.path",
    "config nested deeply": "model.path",
}


@pytest.mark.parametrize("kind", MODELS)
def test_model_that_is_none_is_refused_before_a_folder_is_made(
    kind: str,
    tiny_model: Path,
    tiny_run: list[str],
    canary: Path,
    cli: Callable[..., Finished],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("hostile") / "model"))
    spoilt_model(kind, folder, canary)
    refused(cli(*tiny_run, f"model.path={folder}"), "model.", MODELS[kind])
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == []


def test_code_of_a_model_runs_only_when_the_config_says_so_and_with_a_warning(
    tiny_model: Path,
    tiny_run: list[str],
    canary: Path,
    cli: Callable[..., Finished],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("hostile") / "model"))
    spoilt_model("model code", folder, canary)
    ended = cli("check", *tiny_run, f"model.path={folder}", "model.trust_remote_code=true")
    assert "Warning: model.trust_remote_code is true" in ended.out + ended.err
    assert str(folder) in ended.out + ended.err
    assert canary.exists(), "it is code, and was asked for"
    assert "Warning" not in cli("check", *tiny_run).out + cli("check", *tiny_run).err


def spoil_tokenizer(kind: str, folder: Path) -> None:
    name = "tokenizer.json" if kind.startswith("a number") else "tokenizer_config.json"
    stored = json.loads((folder / name).read_text())
    if kind == "a number in the vocabulary":
        stored["model"]["vocab"]["zz"] = 1e30
    elif kind == "a length that is text":
        stored["model_max_length"] = "99999"
    elif kind == "a token that is a list":
        stored["pad_token"] = [1]
    (folder / name).write_text(json.dumps(stored))


@pytest.mark.parametrize("kind", ["a number in the vocabulary", "a length that is text", "a token that is a list"])
def test_tokenizer_that_is_none_is_a_listed_error(
    kind: str, run: Path, tiny_model: Path, tiny_run: list[str], tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    spoil_tokenizer(kind, run / "adapter")
    refused(cli("predict", str(run), "text=say"), "no tokenizer can be loaded")
    shutil.copytree(tiny_model, tmp_path / "model")
    spoil_tokenizer(kind, tmp_path / "model")
    refused(cli("check", *tiny_run, "model.path=model"), "model.path")
