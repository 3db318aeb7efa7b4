"""Compressed files, other encodings and JSON of any layout hold the same rows as plain lines of JSON."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from loraplus_hydra.data.files import load
from loraplus_hydra.data.readers import Layout, read
from loraplus_hydra.errors import ConfigErrors, UserError

ROWS = [{"prompt": f"say {number} é", "completion": [number, None]} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": partial(pa.compress, codec="zstd", asbytes=True),
    ".lz4": partial(pa.compress, codec="lz4", asbytes=True),
}


def rows_of(path: Path, encoding: str = "utf-8", format: str = "jsonl") -> list[dict[str, object]]:
    rows = read(str(path), Layout(format, delimiter=",", encoding=encoding))
    return [{name: value for name, value in row.items() if not name.startswith("__")} for row in rows]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_unpacked_whatever_their_name(tmp_path: Path, suffix: str) -> None:
    packed = COMPRESS[suffix](LINES.encode())
    for name in (f"rows.jsonl{suffix}", "rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(packed)
        assert rows_of(path) == ROWS
    # Half a file is no file, in any of the formats.
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="incomplete or damaged"):
        rows_of(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_in_another_encoding_names_its_line_in_compressed_files_too(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"a": "b"}\n{"a": "\xe9"}\n'))
    with pytest.raises(UserError, match="line 2: not utf-8 text"):
        rows_of(path)


def test_a_compressed_table_is_loaded_by_the_suffix_inside(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv.gz"
    path.write_bytes(gzip.compress(b"text\tlabel\na, b\t1\n"))
    assert load(str(path), str(path))["train"][0]["text"] == "a, b"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("configured", ["utf-8", "latin-1"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, encoding: str, configured: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(LINES.encode(encoding)))
    assert rows_of(path, configured) == ROWS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_text_without_a_mark_is_found_by_its_null_bytes(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,text\na,é\n".encode(encoding))
    assert rows_of(path, format="csv") == [{"prompt": "a", "text": "é"}]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archives_are_to_be_unpacked(tmp_path: Path, kind: str) -> None:
    inside, path = tmp_path / "rows.jsonl", tmp_path / f"rows.{kind}"
    inside.write_text(LINES, encoding="utf-8")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            packed.write(inside)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(inside)
    with pytest.raises(UserError, match=r"is an archive \(zip or tar\); unpack it"):
        rows_of(path)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        "\n\n" + json.dumps(ROWS, indent=2),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        LINES.replace("\n", "\n\n"),
        LINES.replace("\n", "\r\n"),
    ],
    ids=["array", "indented array", "indented objects", "empty lines", "carriage returns"],
)
def test_json_of_any_layout_holds_the_same_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8", newline="")
    assert rows_of(path) == ROWS


def test_places_in_indented_json_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS), encoding="utf-8")
    assert [row["__origin__"] for row in read(str(path), Layout("jsonl"))] == [f"{path}, line {n}" for n in (1, 8, 15)]


def test_json_that_python_would_read_by_halves_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: an object has the key 'prompt' twice"):
        rows_of(path)
    path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    with pytest.raises(UserError, match="one object, and its key 'data' is a list of 3 objects; write only this list"):
        rows_of(path)


def test_arrow_files_of_datasets_and_of_others_are_read(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    stream, file = next((tmp_path / "saved").glob("*.arrow")), tmp_path / "other.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, rows.data.table.schema) as writer:
        writer.write_table(rows.data.table)
    for path in (stream, file):
        loaded = load(str(path), str(path))["train"]
        assert (list(loaded["text"]), list(loaded["label"])) == (["a", "b"], [1, 0])
        assert loaded.features["label"].names == ["no", "yes"]
    file.write_bytes(b"text")
    with pytest.raises(UserError, match=r"other\.arrow: can't be read as a file in one of Arrow's"):
        load(str(file))


def test_files_whose_columns_differ_in_type_are_mixed_by_value(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}]
    lines, table, text = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.csv"
    lines.write_text(json.dumps({"messages": turns, "label": "maybe", "only": 1}) + "\n", encoding="utf-8")
    features = Features({"messages": List({key: Value("string") for key in ("role", "content", "name")})})
    features["label"] = ClassLabel(names=["no", "yes"])
    Dataset.from_list([{"messages": turns, "label": 0}], features=features).to_parquet(table)
    text.write_text('messages,label\n"[]",x\n', encoding="utf-8")
    (held_out := tmp_path / "d.csv").write_text("messages\na\n", encoding="utf-8")
    rows = load([str(lines), str(table), str(text)], str(held_out))["train"]
    # Parquet's null for a key that only another message has is no value.
    assert list(rows["messages"]) == [turns, turns, "[]"]
    assert list(rows["label"]) == ["maybe", "no", "x"]
    assert list(rows["only"]) == [1, None, None]


def test_a_date_in_one_file_and_text_in_another_stay_different(tmp_path: Path) -> None:
    table, lines = tmp_path / "a.parquet", tmp_path / "b.jsonl"
    Dataset.from_dict({"when": [date(2020, 1, 2)]}).to_parquet(table)
    lines.write_text('{"when": "2020-01-02"}\n', encoding="utf-8")
    (held_out := tmp_path / "c.csv").write_text("when\na\n", encoding="utf-8")
    rows = load([str(table), str(lines)], str(held_out))["train"]
    assert list(rows["when"]) == [{"date": "2020-01-02"}, "2020-01-02"]


@pytest.mark.parametrize("several", [False, True])
def test_class_names_in_one_file_and_numbers_in_another_are_an_error(tmp_path: Path, several: bool) -> None:
    def label(value: int | str) -> Any:
        return [value] if several else value

    table, other, held_out = (tmp_path / name for name in ("a.parquet", "b.jsonl", "c.csv"))
    names = ClassLabel(names=["no", "yes"])
    features = Features({"label": List(names) if several else names})
    Dataset.from_dict({"label": [label(0)]}, features=features).to_parquet(table)
    held_out.write_text("label\nno\n", encoding="utf-8")
    other.write_text(json.dumps({"label": label(1)}), encoding="utf-8")
    with pytest.raises(ConfigErrors, match="'label' has the names no, yes in one file, and the numbers 1 in another"):
        load([str(table), str(other)], str(held_out))
    other.write_text(json.dumps({"label": label("yes")}), encoding="utf-8")
    assert list(load([str(table), str(other)], str(held_out))["train"]["label"]) == [label("no"), label("yes")]


@pytest.mark.parametrize("weighted", [False, True])
def test_streamed_files_whose_columns_differ_in_type_keep_their_values(tmp_path: Path, weighted: bool) -> None:
    values = {"a.jsonl": [1, "b", None], "b.jsonl": [["c"], {"d": 1.5}, True]}
    paths = []
    for name, each in values.items():
        paths.append(str(tmp_path / name))
        rows = [{"value": value, name: 1} for value in each]
        Path(paths[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = dict.fromkeys(paths, 1.0) if weighted else paths
    (held_out := tmp_path / "c.jsonl").write_text('{"value": 1}\n', encoding="utf-8")
    streamed = load(files, str(held_out), streaming=True)["train"]  # type: ignore[arg-type]
    found = [row["value"] for row in streamed]
    every = [value for each in values.values() for value in each]
    assert all(value in every for value in found)
    assert weighted or len(found) == len(every)
