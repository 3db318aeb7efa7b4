"""Fingerprints of weights and rows follow from content: compared with what changed, not with another hash."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import save_file

from loraplus_hydra.data.fingerprint import fingerprint
from loraplus_hydra.data.rows import ORIGIN
from loraplus_hydra.io.fingerprints import BLOCK, BLOCKS, of_weights

TENSORS = {"a": torch.arange(40_000.0).reshape(200, 200), "b": torch.ones(7), "c": torch.arange(50_000.0) / 7}


def stored(file: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def test_shards_names_and_metadata_are_no_content(tmp_path: Path) -> None:
    whole = of_weights([stored(tmp_path / "whole.safetensors", TENSORS)])
    shards = [stored(tmp_path / f"{name}.safetensors", {name: TENSORS[name]}) for name in "cab"]
    save_file(TENSORS, tmp_path / "other.safetensors", {"format": "pt"})
    assert of_weights(shards) == of_weights([tmp_path / "other.safetensors"]) == whole


@pytest.mark.parametrize("offsets", [[0, 2**70], [0, 2**60], [-(2**60), 0], [8, 4]])
def test_a_tensor_outside_its_file_is_an_error(offsets: list[int], tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="x is outside the file"):
        of_weights([file])


@pytest.mark.parametrize("largest", [2**29, 0])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"b": tensors["b"] * 2},
        lambda tensors: tensors | {"b": tensors["b"].half()},
        lambda tensors: tensors | {"a": tensors["a"].reshape(100, 400)},
        lambda tensors: {("d" if name == "a" else name): tensor for name, tensor in tensors.items()},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "c"},
        lambda tensors: tensors | {"a": tensors["a"] + 1e-2},  # each number of a sampled tensor
    ],
)
def test_other_weights_differ_also_where_blocks_are_sampled(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], largest: int, tmp_path: Path
) -> None:
    before = of_weights([stored(tmp_path / "before.safetensors", TENSORS)], largest=largest)
    assert of_weights([stored(tmp_path / "after.safetensors", change(dict(TENSORS)))], largest=largest) != before


def test_one_number_is_seen_within_the_limit_and_by_the_stated_share_beyond_it(tmp_path: Path) -> None:
    numbers = 2**20  # four mebibytes
    file = tmp_path / "one.safetensors"
    tensor = torch.zeros(numbers)
    limits = {"all": 2**29, "blocks": 0}
    before = {name: of_weights([stored(file, {"x": tensor})], largest=limit) for name, limit in limits.items()}
    seen = dict.fromkeys(limits, 0)
    chance = random.Random(0)
    for _ in range(200):
        place = chance.randrange(numbers)
        tensor[place] = 1
        stored(file, {"x": tensor})
        tensor[place] = 0
        for name, limit in limits.items():
            seen[name] += of_weights([file], largest=limit) != before[name]
    expected = 200 * BLOCKS * BLOCK / (4 * numbers)  # 3.1 of 200
    assert seen["all"] == 200
    assert 0 < seen["blocks"] < 3 * expected


def rows(count: int = 2500) -> list[dict[str, object]]:
    return [
        {
            "text": f"é{i}",
            "numbers": None if i % 3 else [i, i + 1],
            "inner": {"share": i / 2, "name": None if i % 2 else "x"},
            "flag": i % 2 == 0,
            "turns": [{"role": "user", "content": f"say {i}"}],
            "raw": bytes([i % 256]),
        }
        for i in range(count)
    ]


def test_equal_rows_have_one_fingerprint_however_they_are_stored(tmp_path: Path) -> None:
    plain = Dataset.from_list(rows())
    expected = fingerprint(plain)
    backwards = list(range(2500))[::-1]
    plain.save_to_disk(tmp_path / "stored")
    same = [
        concatenate_datasets([plain.select(range(701)), plain.select(range(701, 2500))]),
        plain.select(backwards).select(backwards),
        Dataset.from_list(rows() + rows()).select(range(2500, 5000)),
        Dataset.from_list([dict(reversed(row.items())) for row in rows()]),
        Dataset.load_from_disk(tmp_path / "stored"),
        plain.add_column(ORIGIN, ["a file"] * 2500),
        plain.with_format("torch", columns=["flag"]),
    ]
    assert [fingerprint(each) for each in same] == [expected] * len(same)


@pytest.mark.parametrize(
    "change",
    [
        {"text": "y"},
        {"numbers": [1]},
        {"numbers": []},
        {"inner": {"share": 1.0, "name": ""}},
        {"flag": True},
        {"turns": [{"role": "user", "content": ""}]},
        {"turns": []},
        {"raw": b""},
    ],
)
def test_one_changed_value_is_seen(change: dict[str, object]) -> None:
    changed = rows()
    changed[2401] |= change
    assert fingerprint(Dataset.from_list(changed)) != fingerprint(Dataset.from_list(rows()))


def test_values_do_not_run_into_each_other() -> None:
    columns = [{"x": ["ab", "c"]}, {"x": ["a", "bc"]}, {"x": ["ab", None]}, {"x": ["ab", ""]}, {"y": ["ab", "c"]}]
    assert len({fingerprint(Dataset.from_dict(each)) for each in columns}) == len(columns)


def test_order_of_rows_counts_and_many_rows_are_sampled_the_same_way() -> None:
    plain = Dataset.from_list(rows())
    assert fingerprint(plain.select(range(2500)[::-1])) != fingerprint(plain)
    sampled = fingerprint(plain, largest=100_000)
    assert sampled == fingerprint(Dataset.from_list(rows()), largest=100_000)
    assert sampled != fingerprint(Dataset.from_list(rows()[::-1]), largest=100_000)
