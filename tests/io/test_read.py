"""Reader of a run's files: OmegaConf's types, and errors that name the broken or hostile file and the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from loraplus_hydra.io import read
from loraplus_hydra.io.read import (
    Missing,
    Unreadable,
    inside,
    parse_yaml,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    read_yaml,
    refuse_large,
)

_TYPES = """
number: 1e-4
others: [1.5, -3e+2, .5, 12:30, 0x1f, -.inf, 1_000, true, null, ~]
date: 2024-01-01
path: !!python/object/apply:pathlib.PosixPath [/, data, rows]
1: {a: "2"}
"""


def test_yaml_is_typed_as_by_omegaconf() -> None:
    assert parse_yaml(_TYPES) == OmegaConf.to_container(OmegaConf.create(_TYPES))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1, 2", "while parsing a flow sequence"),
        ("a: 1\na: 2", "a key exists twice: a"),
        ("a: &x [1]\nb: *x", "YAML aliases"),
        ("[" * 100_000, "more than 100 nested levels"),
        ("{a: " * 100_000 + "}" * 100_000, "more than 100 nested levels"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!bool x", ""),
        ("!!timestamp 0001-01-01 00:00:00 +99:00", ""),
        ("\x00", "unacceptable character"),
        ("[1]", "it holds a list, not a mapping"),
        ("", "it is empty"),
    ],
)
def test_broken_yaml_is_refused_with_its_name_and_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Unreadable, match=r"config\.yaml can't be read: ") as caught:
        read_yaml(tmp_path / "config.yaml")
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["{", "", "[]", "[" * 100_000, b"\xff"])
def test_broken_json_is_refused_with_its_name(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "result.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Unreadable, match=r"result\.json can't be read: ."):
        read_json(tmp_path / "result.json")


def test_json_of_the_wanted_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    assert read_json(tmp_path / "list.json", list) == [1]


@pytest.mark.parametrize("read", [read_json, read_yaml, read_lines])
def test_missing_file_differs_from_a_broken_one(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(Missing):
        read(tmp_path / "no folder" / "file")
    with pytest.raises(Unreadable) as caught:
        read(tmp_path)
    assert not isinstance(caught.value, Missing)


def test_lines_that_hold_no_object_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\nnull\n\n{"step": 3}\n{"st')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3}]


READERS = {"json": read_json, "yaml": read_yaml, "lines": read_lines, "text": read_text, "bytes": read_bytes}


@pytest.mark.parametrize("kind", READERS)
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("fifo", "link", "device", "."):
        with pytest.raises(Unreadable, match="can't be read"):
            READERS[kind](tmp_path / name)
    with pytest.raises(Unreadable, match="not a regular file"):
        READERS[kind](Path("/dev/null"))


@pytest.mark.parametrize("kind", READERS)
def test_size_of_a_file_is_bounded(kind: str, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)  # without taking space on the disk
    with pytest.raises(Unreadable, match="larger than"):
        READERS[kind](tmp_path / "huge")


@pytest.mark.parametrize("levels", [101, 500, 200_000])
@pytest.mark.parametrize("form", ["[{}]", '{{"a":{}}}'])
def test_depth_of_json_is_bounded(form: str, levels: int, tmp_path: Path) -> None:
    before, after = form.format("|").split("|")
    (tmp_path / "deep").write_text(before * levels + "1" + after * levels)
    with pytest.raises(Unreadable, match="can't be read"):
        read_json(tmp_path / "deep", dict if before[0] == "{" else list)
    (tmp_path / "deep").write_text(before * 100 + "1" + after * 100)
    assert read_json(tmp_path / "deep", dict if before[0] == "{" else list)


def test_link_to_a_folder_inside_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / ".hydra").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unreadable, match="is a link"):
        inside(tmp_path / "run", ".hydra", "config.yaml")


def test_hub_caches_link_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "abc").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert read_json(snapshot / "config.json") == {"a": 1}


def test_memory_that_json_takes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_MOST_ITEMS", 100)
    (tmp_path / "few.json").write_text(f"[{'[],' * 30}[]]")
    (tmp_path / "many.json").write_text(f"[{'[],' * 40}[]]")
    assert len(read_json(tmp_path / "few.json", list)) == 31
    refuse_large([tmp_path / "few.json", tmp_path / "missing.json"])
    with pytest.raises(Unreadable, match=r"many\.json can't be read: the text has more than 100 values"):
        read_json(tmp_path / "many.json", list)
    with pytest.raises(Unreadable, match=r"many\.json has more than 100 values"):  # a library would read it
        refuse_large([tmp_path / "many.json"])


def test_size_of_what_a_library_reads_is_bounded(tmp_path: Path) -> None:
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)  # takes no room on the disk
    for name, why in (
        ("config.json", "it is larger"),
        ("vocab.txt", "it is larger"),
        ("model.safetensors", "its header"),
    ):
        with pytest.raises(Unreadable, match=f"{name} can't be read: {why}"):
            refuse_large([tmp_path / name])
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**36], "data_offsets": [0, 2**38]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(tmp_path / "model.safetensors", 8 + len(header) + 2**38)
    refuse_large([tmp_path / "model.safetensors"])  # weights may be large


def test_config_is_smaller_than_a_vocabulary(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(json.dumps({"a": "x" * 9_000_000}))
    refuse_large([tmp_path / "tokenizer.json"])
    for name in ("config.json", "tokenizer_config.json"):
        with pytest.raises(Unreadable, match="it is larger than"):
            refuse_large([tmp_path / name])
