"""Folder names of sweeps and jobs: readable, safe, and unique for each config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.config.identity import config_hash
from loraplus_hydra.sweep.names import job_name, sweep_name

KEYS = st.from_regex(r"[a-z_][a-zA-Z0-9_]*(\.[a-zA-Z_][a-zA-Z0-9_]*){0,3}", fullmatch=True) | st.text(min_size=1)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["../..", "/etc", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
VARIED = st.dictionaries(KEYS, VALUES, max_size=6)


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ({"loraplus.ratio": 4, "seed": 1}, "ratio-4_seed-1_3fa9c1d2"),
        ({"loraplus.ratio": 4.0}, "ratio-4_3fa9c1d2"),
        ({"loraplus.lr_A": 1e-4, "loraplus.lr_B": 0.01}, "lr_A-1e-4_lr_B-0.01_3fa9c1d2"),
        ({"optimizer": "adamw8bit", "trainer.bf16": False}, "optimizer-adamw8bit_bf16-false_3fa9c1d2"),
        ({"adapter.target_modules": ["q_proj", "v_proj"]}, "target_modules-q_proj-v_proj_3fa9c1d2"),
        ({"model.path": "../other/model a"}, "path-..-other-model-a_3fa9c1d2"),
        ({"data.path": "https://me:s3cret@acme.com/a"}, "path-https-acme.com-a_3fa9c1d2"),
        ({"data.train": ["s3://me:s3cret@b/a"]}, "train-s3-b-a_3fa9c1d2"),
        ({"data.train": None}, "train-null_3fa9c1d2"),
        ({"optimizer.lr": 1.0, "model.lr": 2.0}, "optimizer.lr-1_model.lr-2_3fa9c1d2"),
        ({}, "job_3fa9c1d2"),
    ],
)
def test_name_says_what_the_job_varies(varied: dict[str, Any], name: str) -> None:
    assert job_name(varied, "3fa9c1d20815") == name


@given(VARIED, st.binary())
def test_any_value_makes_a_safe_name(varied: dict[str, Any], content: bytes) -> None:
    name = job_name(varied, config_hash(repr(content)))
    assert re.fullmatch(r"[A-Za-z0-9+][A-Za-z0-9.+_-]*", name)
    assert len(name) <= 140
    assert Path("sweeps", name).resolve().parent == Path("sweeps").resolve()
    # as an override's value, and as the word behind a command
    assert OverridesParser.create().parse_override(f"run=outputs/{name}").value() == f"outputs/{name}"


@given(VARIED, VALUES, VALUES)
def test_other_configs_have_other_names(varied: dict[str, Any], one: Any, other: Any) -> None:
    first, second = config_hash({"key": one}), config_hash({"key": other})
    assert (job_name(varied, first) == job_name(varied, second)) == (first == second)


@given(st.lists(KEYS, unique=True, max_size=5))
def test_sweep_is_named_after_its_keys(keys: list[str]) -> None:
    name = sweep_name(keys, "3fa9c1d20815")
    assert re.fullmatch(r"[A-Za-z0-9+][A-Za-z0-9.+_-]*", name)
    assert sweep_name(keys, "3fa9c1d20816") == name  # eight digits of the hash are in it
    assert sweep_name(keys, "4fa9c1d20815") != name
