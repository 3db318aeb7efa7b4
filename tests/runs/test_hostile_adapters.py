"""Untrusted adapter folders: pickles, broken files and links are refused, and nothing is left."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.support.finished_runs import finished
from tests.support.hostile import Touch, canary, files_of, going_on, pickled, refused, run, truncated

__all__ = ["canary", "finished", "run"]


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


ALLOWED = "allow_changed_inputs=true"  # the fingerprint of the adapter would refuse each spoilt one already
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


SPOILT = [  # with `merge=false` a copy is made without a model
    (kind, command)
    for kind, (_, told) in WEIGHTS.items()
    for command in (["export"], ["export", "merge=false"], ["evaluate"])
    if not (command[-1] == "merge=false" and "model" in told)
]


@pytest.mark.parametrize(("kind", "command"), SPOILT)
def test_weights_that_are_none_are_refused(
    kind: str, command: list[str], run: Path, canary: Path, cli: Callable[..., Finished]
) -> None:
    spoil_weights, told = WEIGHTS[kind]
    spoil_weights(run / "adapter" / "adapter_model.safetensors", canary)
    before = files_of(run)
    refused(cli(command[0], str(run), *command[1:], ALLOWED), told)
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
    "not a method": ({"peft_type": None}, "adapter_config.json can't be read"),
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
        "megatron_config is a path outside",
    ),
    "adapters elsewhere": ({"peft_type": "XLORA", "adapters": {"0": "../../elsewhere"}}, ""),
    "layers that aren't there": ({"target_modules": ["nothing"]}, ""),
    "a broken pattern": ({"target_modules": "("}, ""),
    "a target": ({"target_modules": {"_target_": "os.system", "command": "touch CANARY"}}, ""),
}


COMMANDS = (["export"], ["predict", "text=say"], ["evaluate"], ["check"])


@pytest.mark.parametrize(
    ("kind", "command"),
    [  # each kind by two commands in turn; by the other two, which read a config in the same place, if slow tests run
        pytest.param(kind, command, marks=[] if (which - number) % 4 < 2 else pytest.mark.slow)
        for number, kind in enumerate(ADAPTER_CONFIGS)
        for which, command in enumerate(COMMANDS)
    ],
)
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
    arguments = ["check", *going_on(run)] if command == ["check"] else [command[0], str(run), *command[1:], ALLOWED]
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
    ended = cli("predict", str(run), "text=say", ALLOWED)
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
