"""Messages about files that are not what they seem name what would be right."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from loraplus_hydra.config.schema import run_of
from loraplus_hydra.data import hub
from loraplus_hydra.data.files import load
from loraplus_hydra.errors import ConfigErrors

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 4


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(("compress", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2")])
def test_compressed_file_is_to_be_unpacked(
    tmp_path: Path, compress: Callable[[bytes], bytes], kind: str, encoding: str
) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(compress(ROWS))
    with pytest.raises(ConfigErrors, match=rf"it is compressed \({kind}\); unpack it"):
        load(str(file), encoding=encoding, unit="line")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes("prompt,completion\na,b\nc,d\n".encode(encoding))
    with pytest.raises(ConfigErrors, match=f"data.encoding={encoding}"):
        load(str(file))
    assert load(str(file), encoding=encoding)["train"].column_names[:2] == ["prompt", "completion"]


def test_pipe_and_dangling_link_are_named(tmp_path: Path) -> None:
    pipe, link = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    os.mkfifo(pipe)
    link.symlink_to("gone.jsonl")
    with pytest.raises(ConfigErrors, match="is a pipe, not a file"):
        load(str(pipe))
    with pytest.raises(ConfigErrors, match=r"is a link to gone.jsonl, which does not exist"):
        load(str(link))
    with pytest.raises(ConfigErrors, match="is a device, not a file"):
        load("/dev/null", format="jsonl")


def test_parquet_without_rows_has_none(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), file)
    with pytest.raises(ConfigErrors, match=r"a\.parquet has no rows"):
        load(str(file))


def test_columns_without_a_header_are_named_by_number(compose: Callable[..., Any]) -> None:
    columns = ("data.prompt_column=0", "data.completion_column=1")
    data = run_of(compose("data=csv", "data.train=x.csv", "data.header=false", *columns)).data
    assert (data.prompt_column, data.completion_column) == ("0", "1")


@pytest.mark.parametrize("entry", ["../secret/t.jsonl", "/etc/t.jsonl", "https://host.example/t.jsonl"])
def test_metadata_of_a_data_set_names_no_file_outside(tmp_path: Path, entry: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(ROWS)
    assert len(hub.load(str(folder))["train"]) > 0
    metadata = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": entry}]}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(metadata)}\n---\nA card\n")
    with pytest.raises(ConfigErrors, match="which is outside the folder"):
        hub.load(str(folder))
