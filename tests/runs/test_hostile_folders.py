"""Folders that nobody trusts, an adapter's and a model's: pickles, lies and links are refused; nothing is left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.errors import ConfigErrors
from tests.conftest import Finished
from tests.support.finished_runs import finished
from tests.support.hostile import Touch, canary, files_of, going_on, refused, run

__all__ = ["canary", "finished", "run"]

# An adapter's folder


def pickled(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Touch(canary)))


def zipped_pickle(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touch(canary)))
        archive.writestr("archive/version", "3")


def huge_header(path: Path, canary: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def long_header(path: Path, canary: Path) -> None:
    path.write_bytes(struct.pack("<Q", 200_000_000) + b" " * 1000)


def nested_header(path: Path, canary: Path) -> None:
    header = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def beyond_the_end(path: Path, canary: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8_000_000]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"12345678")


def truncated(path: Path, canary: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def empty(path: Path, canary: Path) -> None:
    path.write_bytes(b"")


def changed_weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path, Path], None]:
    def write(path: Path, canary: Path) -> None:
        from safetensors.torch import load, save_file

        save_file(change(load(path.read_bytes())), path, {"format": "pt"})

    return write


def one_not_finite(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors[sorted(tensors)[-1]].view(-1)[-1] = float("nan")
    return tensors


WEIGHTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a pickle": (pickled, "only safetensors are read"),
    "a zipped pickle": (zipped_pickle, "only safetensors are read"),
    "a header without end": (huge_header, "only safetensors are read"),
    "a header longer than the file": (long_header, "only safetensors are read"),
    "a header nested deeply": (nested_header, "only safetensors are read"),
    "tensors beyond the file's end": (beyond_the_end, "only safetensors are read"),
    "cut off": (truncated, "only safetensors are read"),
    "empty": (empty, "only safetensors are read"),
    "not finite": (changed_weights(one_not_finite), "numbers that aren't finite"),
    "wrong shapes": (
        changed_weights(lambda all_: {n: t[:-1].contiguous() for n, t in all_.items()}),
        "doesn't fit the model",
    ),
    "unknown names": (
        changed_weights(lambda all_: {**all_, "x.y": next(iter(all_.values())).clone()}),
        "doesn't fit the model",
    ),
    "names missing": (changed_weights(lambda all_: dict(list(all_.items())[1:])), "doesn't fit the model"),
    "no tensor": (changed_weights(lambda _: {}), "doesn't fit the model"),
}


@pytest.mark.parametrize("command", [["export"], ["export", "merge=false"], ["evaluate"]])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_none_are_refused(
    kind: str, command: list[str], run: Path, canary: Path, cli: Callable[..., Finished]
) -> None:
    spoil_weights, told = WEIGHTS[kind]
    if command[-1] == "merge=false" and "model" in told:
        pytest.skip("a copy is made without a model")
    spoil_weights(run / "adapter" / "adapter_model.safetensors", canary)
    before = files_of(run)
    refused(cli(command[0], str(run), *command[1:]), told)
    assert not canary.exists()
    assert files_of(run) == before


@pytest.mark.parametrize("kind", WEIGHTS)
def test_adapter_to_go_on_with_is_refused_before_a_folder_is_made(
    kind: str, run: Path, canary: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    spoil_weights, told = WEIGHTS[kind]
    spoil_weights(run / "adapter" / "adapter_model.safetensors", canary)
    told = "adapter.path" if told == "doesn't fit the model" else told
    refused(cli(*going_on(run)), "adapter.path", told)
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("beside", [False, True])
def test_pickle_named_as_weights_is_never_read(
    beside: bool, run: Path, canary: Path, cli: Callable[..., Finished]
) -> None:
    pickled(run / "adapter" / "adapter_model.bin", canary)
    if not beside:
        (run / "adapter" / "adapter_model.safetensors").unlink()
    for arguments in (["predict", str(run), "text=say"], ["check", *going_on(run)]):
        ended = cli(*arguments)
        if beside:
            assert ended.status == 0, ended.err
        else:
            refused(ended, "only safetensors are read")
    assert not canary.exists()


ADAPTER_CONFIGS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "adapter_config.json can't be read"),
    "nothing": ("", "adapter_config.json can't be read"),
    "a list": ("[]", "adapter_config.json can't be read"),
    "nested deeply": ("[" * 100_000, "adapter_config.json can't be read"),
    "bytes": ("\x00\x01", "adapter_config.json can't be read"),
    "no method": ({"peft_type": None}, "adapter_config.json can't be read"),
    "an unknown method": ({"peft_type": "os.system"}, "adapter_config.json can't be read"),
    "a method of another kind": ({"peft_type": "PROMPT_TUNING"}, ""),
    "text for a rank": ({"r": "x"}, ""),
    "no rank": ({"r": 0}, ""),
    "a rank below nothing": ({"r": -8}, "r is -8"),
    "a rank that fills memory": ({"r": 10**12}, "r is 1000000000000"),
    "another rank": ({"r": 4}, ""),
    "a rank of one layer that fills memory": ({"rank_pattern": {"q_proj": 10**12}}, "rank_pattern.q_proj"),
    "a package to import": (
        {"megatron_config": {"x": 1}, "megatron_core": "payload.core"},
        "megatron_config leads out",
    ),
    "adapters elsewhere": ({"peft_type": "XLORA", "adapters": {"0": "../../elsewhere"}}, ""),
    "layers that aren't there": ({"target_modules": ["nothing"]}, ""),
    "a broken pattern": ({"target_modules": "("}, ""),
    "a target": ({"target_modules": {"_target_": "os.system", "command": "touch CANARY"}}, ""),
}


@pytest.mark.parametrize("command", [["export"], ["predict", "text=say"], ["evaluate"], ["check"]])
@pytest.mark.parametrize("kind", ADAPTER_CONFIGS)
def test_adapter_config_that_is_none_is_refused(
    kind: str, command: list[str], run: Path, canary: Path, cli: Callable[..., Finished]
) -> None:
    change, told = ADAPTER_CONFIGS[kind]
    file = run / "adapter" / "adapter_config.json"
    if isinstance(change, str):
        file.write_text(change)
    else:
        text = json.dumps(json.loads(file.read_text()) | change)
        file.write_text(text.replace("CANARY", str(canary)))
    before = files_of(run)
    arguments = ["check", *going_on(run)] if command == ["check"] else [command[0], str(run), *command[1:]]
    refused(cli(*arguments), told)
    assert not canary.exists()
    assert files_of(run) == before


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "payload"}},
        {"base_model_name_or_path": "somebody/elses-model"},
        {"base_model_name_or_path": "../../../etc"},
        {"_target_": "os.system", "command": "touch CANARY"},
        {"revision": "../../main"},
        {"runtime_config": {"_target_": "os.system", "command": "touch CANARY"}},
    ],
)
def test_what_an_adapter_config_says_besides_is_not_followed(
    change: dict[str, Any],
    run: Path,
    canary: Path,
    cli: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (run.parent / "payload.py").write_text(f"import os\nos.system('touch {canary}')\n")
    monkeypatch.syspath_prepend(str(run.parent))
    expected = cli("predict", str(run), "text=say").out
    file = run / "adapter" / "adapter_config.json"
    text = json.dumps(json.loads(file.read_text()) | change)
    file.write_text(text.replace("CANARY", str(canary)))
    ended = cli("predict", str(run), "text=say")
    assert ended.status == 0, ended.err
    assert ended.out == expected
    assert not canary.exists()


def test_link_out_of_an_adapters_folder_is_not_published(run: Path, cli: Callable[..., Finished]) -> None:
    secret = run.parent / "id_rsa"
    secret.write_text("secret")
    (run / "adapter" / "notes.txt").symlink_to(secret)
    refused(cli("export", str(run), "merge=false"), "notes.txt is a link")
    assert not (run / "export").exists()


def test_pickles_and_code_in_an_adapters_folder_are_not_published(
    run: Path, canary: Path, cli: Callable[..., Finished]
) -> None:
    pickled(run / "adapter" / "training_args.bin", canary)
    (run / "adapter" / "modeling.py").write_text("import os")
    ended = cli("export", str(run), "merge=false")
    assert ended.status == 0, ended.err
    names = {path.name for path in (run / "export" / "adapter").iterdir()}
    assert not names & {"training_args.bin", "modeling.py"}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names


# A model's folder


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
    "index out of the folder": "no file of the folder",
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


# Links, FIFOs and files of another form in a run's folder


@pytest.fixture
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the run, in which nothing may change."""
    folder = tmp_path_factory.mktemp("victim")
    (folder / "checkpoint-1").mkdir()
    (folder / "file.txt").write_text("precious")
    return folder


def put_link(place: Path, victim: Path) -> None:
    is_folder = place.is_dir() or place.name in ("checkpoints", ".hydra")
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(victim if is_folder else victim / "file.txt")


def unchanged(victim: Path) -> bool:
    return (victim / "file.txt").read_text() == "precious" and len(files_of(victim)) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "result.json", "config.yaml", "param_groups.json", "train.png", "loraplus_hydra.log"),
        *("adapter", "checkpoints", ".hydra", ".hydra/overrides.yaml", f".adapter.{'0' * 16}.unfinished"),
    ],
)
def test_run_with_a_link_is_not_resumed(name: str, run: Path, victim: Path, cli: Callable[..., Finished]) -> None:
    put_link(run / name, victim)
    before = files_of(run)
    refused(cli("resume", str(run), "trainer.max_steps=9"), f"{name} is a link")
    assert unchanged(victim)
    assert files_of(run) == before


def test_own_command_does_not_continue_a_run_with_a_link(
    run: Path, victim: Path, tiny_run: list[str], cli: Callable[..., Finished]
) -> None:
    (run / ".hydra").mkdir()
    put_link(run / "loraplus_hydra.log", victim)
    before = files_of(run)
    ended = cli(*tiny_run, f"hydra.run.dir={run}", "trainer.resume_from_checkpoint=auto")
    refused(ended, "hydra.run.dir", "loraplus_hydra.log is a link")
    assert files_of(run) == before
    assert unchanged(victim)


def test_folder_with_a_link_is_not_trained_into_from_python(
    victim: Path, tmp_path: Path, compose: Callable[..., Any], tiny_run: list[str]
) -> None:
    from loraplus_hydra import run as train

    put_link(tmp_path / "run" / "metrics.jsonl", victim)
    with pytest.raises(ConfigErrors, match=r"metrics.jsonl is a link"):
        train(compose(*tiny_run), tmp_path / "run")
    assert unchanged(victim)


def test_dangling_link_is_no_run_folder(tmp_path: Path, tiny_run: list[str], cli: Callable[..., Finished]) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for folder in ("link", "link/run"):
        refused(cli(*tiny_run, f"hydra.run.dir={folder}"), "is a link that leads nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("kind", ["a FIFO", "a link", "a device"])
@pytest.mark.parametrize(
    "name",
    ["result.json", "config.yaml", "adapter/config.json", "adapter/tokenizer.json", "adapter/adapter_config.json"],
)
def test_what_is_no_regular_file_is_not_read(
    name: str, kind: str, run: Path, victim: Path, cli: Callable[..., Finished]
) -> None:
    place = run / name
    shutil.copy(place, victim / "file.txt")
    place.unlink()
    if kind == "a FIFO":
        os.mkfifo(place)
    else:
        place.symlink_to(victim / "file.txt" if kind == "a link" else "/dev/zero")
    refused(cli("predict", str(run), "text=say"), name)
    refused(cli("export", str(run), "merge=false"), name)


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer"])
def test_fifo_in_a_models_folder_is_not_waited_for(
    key: str, tiny_model: Path, tiny_run: list[str], tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "model" / "tokenizer.json")
    refused(cli("check", *tiny_run, f"{key}=model"), f"{key}: ", "tokenizer.json is neither a file nor a folder")


RESULTS: dict[str, tuple[str, str]] = {
    "no metrics": ('{"status": "ok"}', "it has no 'metric'"),
    "metrics of another type": ('{"status": "ok", "metrics": [], "metrics_before": {}}', "no run writes its 'metrics'"),
    "an error that is text": ('{"status": "failed", "error": "text"}', "no run writes its 'error'"),
    "a status that is a list": ('{"status": ["ok"]}', "no run writes its 'status'"),
    "many levels": ("[" * 200_000 + "]" * 200_000, "can't be read"),
    "many mappings": ('{"a":' * 500 + "1" + "}" * 500, "100 levels"),
}


@pytest.mark.parametrize("command", [["predict", "text=say"], ["evaluate"], ["export"], ["resume"]])
@pytest.mark.parametrize("kind", RESULTS)
def test_result_that_no_run_writes_is_refused(
    kind: str, command: list[str], run: Path, cli: Callable[..., Finished]
) -> None:
    text, reason = RESULTS[kind]
    (run / "result.json").write_text(text)
    if command != ["resume"]:
        refused(cli(command[0], str(run), *command[1:]), reason)
    else:  # it resumes from a checkpoint, whatever the result says
        assert "HYDRA_FULL_ERROR" not in cli("resume", str(run)).err


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
