"""Messages about files that are not what they seem name what would be right."""

from __future__ import annotations

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
