"""Messages about files that are not what they seem name what would be right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from datasets.data_files import DataFilesDict, DataFilesList

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


@pytest.mark.parametrize("streaming", [False, True])
def test_links_in_a_data_set_lead_to_no_file_outside(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    (folder / "own").mkdir(parents=True)
    (tmp_path / "secret.jsonl").write_bytes(ROWS)
    (folder / "own" / "rows.jsonl").write_bytes(ROWS)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").symlink_to("own/rows.jsonl")
    (tmp_path / "alias").symlink_to(folder)
    for name in (folder, tmp_path / "alias"):  # the folder itself may be a link, and may have links to its own files
        rows = hub.load(str(name), train_split="train", eval_split="test", streaming=streaming)
        assert [row["prompt"] for row in rows["train"]] == ["a"] * 4
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(ConfigErrors, match=r"data\.name: .*train\.jsonl', which is outside the data set"):
        hub.load(str(folder), eval_split="test", streaming=streaming)


def test_a_saved_data_set_is_told_how_to_be_loaded(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ConfigErrors, match=r"data\.name: .*saved by save_to_disk; load its files: .*data\.train='(.*)'"
    ) as told:
        hub.load(str(tmp_path / "saved"))
    files = str(told.value).rpartition("data.train='")[2].rstrip("'")
    assert list(load(files, files, format="arrow")["train"]["prompt"]) == ["a", "b"]


def test_the_hubs_own_cache_may_be_read_as_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--owner--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (blobs := folder.parents[1] / "blobs").mkdir()
    (blobs / "123").write_bytes(ROWS)
    (folder / "train.jsonl").symlink_to("../../blobs/123")
    assert len(hub.load(str(folder), eval_fraction=0.25)["train"]) == 3


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("hf://datasets/owner/name@abc/data/train.jsonl", True),
        ("hf://datasets/owner/name@abc/../../../other/name@abc/t.jsonl", False),
        ("hf://datasets/owner/named@abc/train.jsonl", False),
        ("hf://datasets/other/name@abc/train.jsonl", False),
        ("zip://t.jsonl::hf://datasets/owner/name@abc/t.zip", False),
        ("https://host.example/t.jsonl", False),
        ("SECRET", False),
        ("file://SECRET", False),
    ],
)
def test_the_card_of_a_hubs_data_set_names_only_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, own: bool
) -> None:
    (secret := tmp_path / "secret.jsonl").write_bytes(ROWS)
    found = DataFilesDict(train=DataFilesList([file.replace("SECRET", str(secret))], origin_metadata=[]))
    base = "hf://datasets/owner/name@abc"
    builder = SimpleNamespace(repo_id="owner/name", base_path=base, config=SimpleNamespace(data_files=found))
    builder.download_and_prepare = lambda: None
    builder.as_dataset = lambda **_: Dataset.from_dict({"prompt": ["a"] * 4})
    monkeypatch.setattr(hub, "load_dataset_builder", lambda *_, **__: builder)
    if own:
        assert len(hub.load("owner/name", eval_fraction=0.25)["train"]) == 3
    else:
        with pytest.raises(ConfigErrors, match=r"data\.name: owner/name lists '.*', which is outside the data set"):
            hub.load("owner/name")


def test_a_hubs_card_with_an_absolute_path_is_refused_with_the_files_that_datasets_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (secret := tmp_path / "secret.jsonl").write_bytes(ROWS)
    # An absolute path is found on this machine, although the data set is on the hub.
    base = "hf://datasets/owner/name@abc"
    found = DataFilesDict.from_patterns({"train": [str(secret)]}, base_path=base)
    assert list(found["train"]) == [str(secret)]
    builder = SimpleNamespace(repo_id="owner/name", base_path=base, config=SimpleNamespace(data_files=found))
    monkeypatch.setattr(hub, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(ConfigErrors, match=r"secret\.jsonl', which is outside the data set"):
        hub.load("owner/name")
