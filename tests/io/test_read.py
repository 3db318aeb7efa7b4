"""Reader of a run's files: OmegaConf's types, and errors that name the broken or hostile file and the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from loraplus_hydra.io.read import Missing, Unreadable, parse_yaml, read_json, read_lines, read_yaml

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
        ("[" * 100_000, "more than 100 levels"),
        ("{a: " * 100_000 + "}" * 100_000, "more than 100 levels"),
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
