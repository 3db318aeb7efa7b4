"""Values against annotations and ranges, and dataclasses built from JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.check.values import select, value_problems
from loraplus_hydra.config.schema import GROUPS, LIBRARY_RANGES, RunConfig, value_ranges
from loraplus_hydra.config.types import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    WHOLE,
    describe,
    fits,
    from_plain,
    is_finite,
    mismatch,
    range_,
    to_plain,
)

ANNOTATIONS: list[tuple[Any, list[Any], list[Any]]] = [
    (int, [0, -3], [True, 1.0, "1", None]),
    (float, [0, 1.5, math.nan], [False, "1", None, []]),
    (bool, [True], [0, "true", None]),
    (str, [""], [1, None]),
    (int | None, [None, 2], ["x", 2.5]),
    (int | str, [1, "x"], [1.5, None]),
    (Literal["a", 1], ["a", 1], ["b", None]),
    (
        bool | Literal["pissa", "pissa_niter_[number of iters]"],  # PEFT's own annotation of init_lora_weights
        [True, "pissa", "pissa_niter_16"],
        ["pissa_niter_", "pissa_niter_x", "pissa_niter_[number of iters]", "pissa_niter_1.5", 16],
    ),
    (list[int], [[], [1, 2]], [[1, "x"], "x", {}]),
    (tuple[float, float], [[0.9, 0.99]], [["x", 0.99], 0.9]),
    (tuple[str, ...], [["a", "b", "c"]], [["a", 1]]),
    (dict[int, float], [{}, {"1": 0.5}], [{"1": "x"}, []]),
    (dict[str, list[str]], [{"a": ["b"]}], [{"a": "b"}, {"a": [1]}]),
    (Any, [None, 1, object()], []),
    (type, [1, None, "x"], []),
]


@pytest.mark.parametrize(("annotation", "good", "bad"), ANNOTATIONS, ids=[str(each[0]) for each in ANNOTATIONS])
def test_values_fit_annotations(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(value, annotation)] == []
    assert [value for value in bad if fits(value, annotation)] == []


@given(st.one_of(st.floats(), st.integers(), st.sampled_from([10**400, -(10**400)])))
def test_finite_is_what_a_float_holds(value: float) -> None:
    try:
        holds = math.isfinite(float(value))
    except OverflowError:
        holds = False
    assert is_finite(value) is holds
    assert POSITIVE.holds(value) is (holds and value > 0)
    assert NOT_NEGATIVE.holds(value) is (holds and value >= 0)


def test_mismatch_names_the_type_before_the_range() -> None:
    assert mismatch("x", int, COUNT) == "is not a whole number"
    assert mismatch(0, int, COUNT) == "is out of range"
    assert mismatch(None, int | None, COUNT) == mismatch(1, int, COUNT) == ""
    assert mismatch(None, int, COUNT) == "is not a whole number"
    assert mismatch("x", int | None, COUNT) == "is not a whole number"


def test_types_in_words() -> None:
    assert describe(int | None, COUNT) == "a whole number from 1 on, or null"
    assert describe(dict[str, float]) == "a mapping of numbers"
    assert describe(list[str] | None) == "a list of texts or null"
    assert describe(Literal["a", "b"]) == "one of a, b"


@dataclass(frozen=True)
class Inner:
    count: int = field(metadata=range_(WHOLE))


@dataclass(frozen=True)
class Outer:
    inner: Inner
    named: dict[str, Inner]
    class_: str
    rate: float | None = field(default=None, metadata=range_(POSITIVE))


def test_dataclass_is_built_from_json_and_back() -> None:
    plain = {"inner": {"count": 1}, "named": {"a": {"count": 2}}, "class": "x", "rate": 0.5}
    built = from_plain(Outer, json.loads(json.dumps(plain)))
    assert built == Outer(Inner(1), {"a": Inner(2)}, "x", 0.5)
    assert to_plain(built) == plain
    assert from_plain(Outer, {**plain, "more": 1}) == built
    del plain["rate"]
    assert from_plain(Outer, plain).rate is None


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"inner": {"count": -1}}, "inner"),
        ({"inner": {}, "class": 1}, "inner, class"),
        ({"named": {"a": 1}}, "named"),
        ({"named": []}, "named"),
        ({"rate": 0}, "rate"),
    ],
)
def test_values_that_do_not_fit_are_named(change: dict[str, Any], wrong: str) -> None:
    plain = {"inner": {"count": 1}, "named": {}, "class": "x"}
    with pytest.raises(ValueError, match=f"^{wrong}$"):
        from_plain(Outer, plain | change)


@pytest.mark.parametrize("plain", [None, [], "x", {}])
def test_what_holds_no_keys_lacks_all_of_them(plain: Any) -> None:
    with pytest.raises(ValueError, match=r"^inner, named, class$"):
        from_plain(Outer, plain)


def test_every_range_belongs_to_a_group_and_is_checked() -> None:
    for key, (_, limits) in value_ranges().items():
        group, _, inside = key.partition(".")
        assert group in GROUPS or group in RunConfig.__dataclass_fields__, key
        plain: dict[str, Any] = {}
        holder = plain
        *above, last = key.split(".")
        for name in above:
            holder = holder.setdefault(name, {})
        holder[last] = {"not": "a value"}
        assert select(plain, key)[0]
        problems = [problem for problem in value_problems(plain) if problem.key == key]
        assert limits.text in problems[0].fix, key
        assert bool(inside) or key == "seed"


def test_no_key_has_two_ranges() -> None:
    ours = {f"{group}.{name}" for group, schema in GROUPS.items() for name in schema.__dataclass_fields__}
    assert not ours & LIBRARY_RANGES.keys()
