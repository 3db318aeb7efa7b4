"""Rules and grouping, on records alone: no torch, no PEFT."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.errors import ConfigErrors, UserError
from loraplus_hydra.loraplus.grouping import GROUP_ORDER, assign, first_match
from loraplus_hydra.loraplus.plan import Group
from loraplus_hydra.loraplus.rules import ROLES, Rule, TensorRecord, parse_rules

A = TensorRecord("layers.0.q.lora_A.default.weight", "lora_A", "Linear", (4, 16), adapter="default")
B = TensorRecord("layers.0.q.lora_B.default.weight", "lora_B", "Linear", (16, 4), adapter="default")
BIAS = TensorRecord("layers.0.q.base_layer.bias", "bias", "Linear", (16,))
NORM = TensorRecord(
    "layers.0.norm.weight", "norm", "LlamaRMSNorm", (16,), owner_classes=("LlamaRMSNorm", "llama.LlamaRMSNorm")
)
HEAD = TensorRecord("score.modules_to_save.default.weight", "saved_module", "Linear", (2, 16), adapter="default")

LORA_PLUS = [Rule("groupB", role=("lora_B",), ratio=8.0), Rule("groupA")]


def groups_of(records: list[TensorRecord], rules: list[Rule], **options: object) -> dict[str, Group]:
    arguments: Any = {"lr": 1e-3, "weight_decay": 0.1, **options}
    return {group.name: group for group in assign(records, rules, **arguments).groups}


# rules from a mapping


def test_a_rule_takes_scalars_and_lists_and_keeps_other_keys_as_settings() -> None:
    (rule,) = parse_rules(
        {"head": {"role": "saved_module", "pattern": ["score", "head$"], "ndim": [1, 2], "betas": [0.9, 0.99]}}
    )
    assert rule == Rule(
        "head", role=("saved_module",), pattern=("score", "head$"), ndim=(1, 2), settings={"betas": (0.9, 0.99)}
    )
    assert rule.group == "head"


def test_a_null_takes_a_rule_or_a_key_away() -> None:
    rules = parse_rules({"gone": None, "kept": {"role": "lora_B", "ratio": 4, "weight_decay": None}})
    assert rules == [Rule("kept", role=("lora_B",), ratio=4.0)]


@pytest.mark.parametrize(
    ("rule", "key", "message"),
    [
        ({"role": "lora_b"}, "r.role", "no role 'lora_b' (did you mean 'lora_B'?)"),
        ({"role": []}, "r.role", "an empty list matches nothing"),
        ({"role": 3}, "r.role", "must be text"),
        ({"pattern": "("}, "r.pattern", "not a regular expression"),
        ({"owner": [1]}, "r.owner", "must be text"),
        ({"ndim": "two"}, "r.ndim", "must be a whole number"),
        ({"ndim": True}, "r.ndim", "must be a whole number"),
        ({"ndim": -1}, "r.ndim", "must be a whole number"),
        ({"new_head": 1}, "r.new_head", "must be true or false"),
        ({"new_head": "yes"}, "r.new_head", "must be true or false"),
        ({"lr": 1e-3, "ratio": 2}, "r.ratio", "can't be combined with `lr`"),
        ({"lr": 1e-3, "lr_mult": 2}, "r.lr_mult", "can't be combined with `lr`"),
        ({"lr": "1e-3"}, "r.lr", "must be a number"),
        ({"lr": True}, "r.lr", "must be a number"),
        ({"lr": -1e-3}, "r.lr", "not below 0"),
        ({"lr": float("nan")}, "r.lr", "finite"),
        ({"lr_mult": float("inf")}, "r.lr_mult", "finite"),
        ({"ratio": 0}, "r.ratio", "above 0"),
        ({"ratio": -3}, "r.ratio", "above 0"),
        ({"ratio": None}, "r.ratio", "must be a number, got None"),
        ({"lr": None}, "r.lr", "must be a number, got None"),
        ({"weight_decay": -0.1}, "r.weight_decay", "not below 0"),
        ({"group": ""}, "r.group", "must be a name"),
        ({"allow_unmatched": "yes"}, "r.allow_unmatched", "true or false"),
        ({"params": []}, "r.params", "set by the optimizer itself"),
        ("groupA", "r", "a rule is a mapping"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_key(rule: object, key: str, message: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse_rules({"r": rule}, where="loraplus.extra_rules")
    (problem,) = caught.value.problems
    assert problem.key == f"loraplus.extra_rules.{key}"
    assert message in problem.what


def test_single_values_of_a_rule_made_by_hand_are_lists_of_one() -> None:
    hand: Any = Rule  # without its types, as in a script
    assert hand("r", pattern=r"layers\.0\.") == Rule("r", pattern=(r"layers\.0\.",))
    assert not hand("r", role="lora_B_bias").matches(B)
    assert [hand("r", ndim=number).matches(B) for number in (2, 0)] == [True, False]
    assert [hand("r", new_head=new).matches(B) for new in (False, True)] == [True, False]


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"role": "lora_b"}, "role", "no role 'lora_b' (did you mean 'lora_B'?)"),
        ({"pattern": ("layers", "(")}, "pattern", "not a regular expression"),
        ({"ndim": ("two",)}, "ndim", "must be a whole number"),
        ({"lr": float("nan")}, "lr", "finite"),
        ({"lr": 1e-3, "ratio": 2.0}, "ratio", "can't be combined with `lr`"),
        ({"ratio": None}, "ratio", "must be a number, got None"),
        ({"weight_decay": -0.1}, "weight_decay", "not below 0"),
        ({"settings": {"params": []}}, "params", "set by the optimizer itself"),
    ],
)
def test_a_rule_made_by_hand_is_checked_like_one_of_a_mapping(keys: Any, key: str, message: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        Rule("first", **keys)
    (problem,) = caught.value.problems
    assert problem.key == f"Rule('first').{key}"
    assert message in problem.what


def test_all_mistakes_of_all_rules_come_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse_rules({"one": {"role": "lora_C", "ratio": 0}, "two": {"pattern": "["}, "three": 3})
    assert [problem.key.removeprefix("loraplus.rules.") for problem in caught.value.problems] == [
        "one.role",
        "one.ratio",
        "two.pattern",
        "three",
    ]


def test_rules_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigErrors, match="must map names to rules"):
        parse_rules(["groupA"])  # type: ignore[arg-type]


# conditions


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        (Rule("r"), True),
        (Rule("r", role=("lora_B", "norm")), True),
        (Rule("r", role=("lora_B",)), False),
        (Rule("r", pattern=(r"layers\.1\.", r"layers\.0\.")), True),
        (Rule("r", pattern=(r"^norm",)), False),
        (Rule("r", owner=("LlamaRMSNorm",)), True),
        (Rule("r", owner=("llama.LlamaRMSNorm",)), True),
        (Rule("r", owner=("RMSNorm",)), False),
        (Rule("r", ndim=(1,)), True),
        (Rule("r", ndim=(0, 2)), False),
        (Rule("r", role=("norm",), ndim=(2,)), False),
        (Rule("r", new_head=(True,)), False),
        (Rule("r", new_head=(False,)), True),
        (Rule("r", role=("norm",), pattern=("layers",), owner=("LlamaRMSNorm",), ndim=(1,)), True),
    ],
)
def test_a_rule_matches_when_all_its_conditions_hold(rule: Rule, matches: bool) -> None:
    assert rule.matches(NORM) is matches


# groups


def test_the_ratio_reaches_lora_b_only() -> None:
    groups = groups_of([A, B], LORA_PLUS)
    assert groups["groupA"].lr == 1e-3
    assert groups["groupB"].lr == 1e-3 * 8
    assert groups["groupB"].records == (B,)


def test_lr_is_absolute_and_lr_mult_is_relative_and_goes_with_the_ratio() -> None:
    rules = [Rule("fixed", role=("norm",), lr=5e-4), Rule("half", role=("lora_B",), lr_mult=0.5, ratio=8), Rule("rest")]
    groups = groups_of([A, B, NORM], rules)
    assert {name: group.lr for name, group in groups.items()} == {"fixed": 5e-4, "half": 1e-3 * 0.5 * 8, "rest": 1e-3}


def test_extra_rules_stand_ahead_of_the_preset() -> None:
    groups = groups_of([A, B, HEAD], LORA_PLUS, extra=[Rule("head", pattern=("^score",), lr=1e-2, weight_decay=0.0)])
    assert groups["head"].records == (HEAD,)
    assert (groups["head"].lr, groups["head"].weight_decay, groups["groupA"].weight_decay) == (1e-2, 0.0, 0.1)


def test_rules_may_share_a_group_and_it_names_those_that_matched() -> None:
    rules = [
        Rule("biases", role=("bias",), group="flat", weight_decay=0.0),
        Rule("norms", role=("norm",), group="flat", weight_decay=0.0),
        Rule("unused", role=("magnitude",), group="flat", weight_decay=0.0),
        Rule("rest"),
    ]
    assert groups_of([A, BIAS, NORM], rules)["flat"].rules == ("biases", "norms")


def test_documented_groups_come_first_in_peft_s_order_then_the_rules_order() -> None:
    rules = [
        Rule("zebra", role=("norm",)),
        Rule("groupB_no_decay", role=("bias",)),
        Rule("groupB", role=("lora_B",), ratio=2),
        Rule("ape", role=("saved_module",)),
        Rule("groupA"),
    ]
    assert list(groups_of([B, HEAD, NORM, A, BIAS], rules)) == ["groupA", "groupB", "groupB_no_decay", "zebra", "ape"]


# errors that say what to do


def test_a_tensor_that_no_rule_matches_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"no rule matches 2 trained tensors: .*q\.base_layer\.bias \(role bias.*rest: \{\}"
    ):
        assign([A, B, BIAS, NORM], [Rule("a", role=("lora_A", "lora_B"))], lr=1e-3, weight_decay=0.0)


def test_an_extra_rule_that_matches_nothing_is_an_error_unless_it_is_meant() -> None:
    with pytest.raises(
        UserError, match=r"extra_rules\.head \(pattern: scroe\) has no effect: no trained tensor matches it"
    ):
        groups_of([A, B], LORA_PLUS, extra=[Rule("head", pattern=("scroe",))])
    assert groups_of([A, B], LORA_PLUS, extra=[Rule("head", pattern=("scroe",), allow_unmatched=True)]).keys() == {
        "groupA",
        "groupB",
    }


def test_an_extra_rule_in_the_shadow_of_another_is_an_error() -> None:
    extra = [Rule("all_b", role=("lora_B",), ratio=2), Rule("first_b", pattern=(r"layers\.0.*lora_B",), ratio=4)]
    with pytest.raises(UserError, match=r"first_b .*also matched by an earlier extra rule"):
        groups_of([A, B], LORA_PLUS, extra=extra)


def test_a_preset_rule_that_matches_nothing_is_none() -> None:
    assert "groupB_no_decay" not in groups_of([A, B], [Rule("groupB_no_decay", role=("norm",)), *LORA_PLUS])


def test_rules_of_one_group_that_disagree_are_an_error_even_while_unmatched() -> None:
    rules = [Rule("biases", role=("bias",), group="groupA", weight_decay=0.0), *LORA_PLUS]
    with pytest.raises(
        UserError, match=r"'biases' and 'groupA' share group 'groupA' but have different settings: .*weight_decay 0 and"
    ):
        groups_of([A, B], rules)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([A], "no tensor of the adapter gets the ratio"),
        ([B], "every tensor of the adapter gets the ratio"),
        ([NORM, HEAD], "no tensor of a LoRA-like adapter is trained"),
        (
            [
                TensorRecord("w", "other", "Linear", (4, 4), adapter="x"),
                TensorRecord("s", "other", "Linear", (4,), adapter="x"),
            ],
            "no tensor of",
        ),
    ],
)
def test_a_ratio_that_separates_nothing_is_an_error(records: list[TensorRecord], why: str) -> None:
    rules = [Rule("groupB", role=("lora_B", "norm"), ratio=8.0), Rule("vectors", ndim=(1,), ratio=8.0), Rule("groupA")]
    with pytest.raises(UserError, match=f"the LoRA\\+ ratio 8 has no effect here: {re.escape(why)}"):
        groups_of(records, rules)
    assert groups_of(records, [Rule("groupA")])  # without a ratio nothing is wrong


def test_rates_by_depth_that_bury_the_ratio_are_noticed() -> None:
    with pytest.raises(UserError, match="has no effect here"):
        groups_of([A, B], LORA_PLUS, extra=[Rule("depth0", pattern=(r"layers\.0\.",), lr_mult=0.5)])


@pytest.mark.parametrize("lr", [0, -1e-3, float("nan"), float("inf"), None, "1e-3", True])
def test_a_base_rate_must_be_finite_and_above_zero(lr: object) -> None:
    with pytest.raises(UserError, match="lr must be"):
        groups_of([A, B], LORA_PLUS, lr=lr)


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), None, "0"])
def test_a_weight_decay_must_be_finite_and_not_below_zero(weight_decay: object) -> None:
    with pytest.raises(UserError, match="weight_decay must be"):
        groups_of([A, B], LORA_PLUS, weight_decay=weight_decay)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="no trained tensor"):
        groups_of([], LORA_PLUS)


def test_grouping_needs_no_torch() -> None:
    code = "import sys, loraplus_hydra.loraplus.grouping; assert not {'torch', 'peft', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# for all records and rules

words = st.sampled_from(["lora_A", "my_lora_B", "lora_Block", "bias", "layers.0", "q", "Ä", "x y"])
records_ = st.lists(
    st.builds(
        TensorRecord,
        name=st.lists(words, min_size=1, max_size=4).map(".".join),
        role=st.sampled_from(ROLES),
        owner=st.sampled_from(["Linear", "Embedding", "LlamaRMSNorm"]),
        shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
        adapter=st.sampled_from([None, "default", "lora_B"]),
    ),
    min_size=1,
    max_size=12,
)
condition = {
    "role": st.lists(st.sampled_from(ROLES), max_size=3).map(tuple),
    "pattern": st.lists(st.sampled_from(["lora_B", r"^layers\.0", "bias$", "q|x"]), max_size=2).map(tuple),
    "owner": st.lists(st.sampled_from(["Linear", "Embedding"]), max_size=2).map(tuple),
    "ndim": st.lists(st.integers(0, 3), max_size=2).map(tuple),
}
rates = st.one_of(
    st.fixed_dictionaries({"lr": st.floats(0, 1)}),
    st.fixed_dictionaries({"lr_mult": st.floats(0, 4)}),
)
rule_keys = st.tuples(st.fixed_dictionaries(condition), rates, st.sampled_from([None, 0.0, 0.2]))


@st.composite
def rule_lists(draw: st.DrawFn) -> list[Rule]:
    keys = draw(st.lists(rule_keys, max_size=6))
    rules = [
        Rule(f"r{i}", **conditions, **rate, weight_decay=decay) for i, (conditions, rate, decay) in enumerate(keys)
    ]
    order = draw(st.permutations([*GROUP_ORDER]))
    return [Rule(**{**vars_of(rule), "name": name}) for rule, name in zip(rules, [*order, "x", "y"], strict=False)] + [
        Rule("rest")
    ]


def vars_of(rule: Rule) -> dict[str, object]:
    fields = ("role", "pattern", "owner", "ndim", "lr", "lr_mult", "weight_decay")
    return {key: getattr(rule, key) for key in fields}


@given(records_, rule_lists(), st.floats(1e-6, 1.0), st.floats(0, 1))
def test_every_tensor_is_in_exactly_one_group_by_its_first_rule(
    records: list[TensorRecord], rules: list[Rule], lr: float, weight_decay: float
) -> None:
    groups = assign(records, rules, lr=lr, weight_decay=weight_decay).groups
    assert all(group.records for group in groups)
    placed = [id(record) for group in groups for record in group.records]
    assert sorted(placed) == sorted(map(id, records))
    position = {id(record): index for index, record in enumerate(records)}
    for group in groups:
        assert [position[id(record)] for record in group.records] == sorted(
            position[id(record)] for record in group.records
        )
        for record in group.records:
            first = next(rule for rule in rules if satisfies(record, rule))
            assert first.name in group.rules
            assert group.lr == (first.lr if first.lr is not None else lr * first.lr_mult)
            assert group.weight_decay == (weight_decay if first.weight_decay is None else first.weight_decay)
    documented = [group.name for group in groups if group.name in GROUP_ORDER]
    assert documented == [name for name in GROUP_ORDER if name in documented]
    assert [group.name for group in groups][: len(documented)] == documented


def satisfies(record: TensorRecord, rule: Rule) -> bool:
    """The four conditions, spelled out once more."""
    return (
        (not rule.role or record.role in rule.role)
        and (not rule.pattern or any(re.search(pattern, record.name) for pattern in rule.pattern))
        and (not rule.owner or record.owner in rule.owner)
        and (not rule.ndim or len(record.shape) in rule.ndim)
    )


@given(records_, rule_lists(), st.lists(st.sampled_from([1.0, 1.0, 4.0, 8.0]), min_size=7, max_size=7))
def test_a_ratio_is_refused_exactly_when_no_two_tensors_of_the_adapter_differ_in_it(
    records: list[TensorRecord], rules: list[Rule], ratios: list[float]
) -> None:
    rules = [
        Rule(**{**vars_of(rule), "name": rule.name, "lr": None, "ratio": ratio})
        for rule, ratio in zip(rules, ratios, strict=False)
    ]
    rules.append(Rule("last"))
    beside = {"saved_module", "bias", "norm", "trainable_tokens"}
    pair = [r for r in records if r.adapter and r.role not in beside and not (r.role == "other" and len(r.shape) < 2)]
    found = {next(rule for rule in rules if satisfies(record, rule)).ratio for record in pair}
    if any(rule.ratio != 1 for rule in rules) and len(found) < 2:
        with pytest.raises(UserError, match="has no effect here"):
            assign(records, rules, lr=1e-3, weight_decay=0.0)
    else:
        assert assign(records, rules, lr=1e-3, weight_decay=0.0).groups


@given(records_, rule_lists(), st.randoms())
def test_the_order_of_the_tensors_decides_nothing(
    records: list[TensorRecord], rules: list[Rule], random: object
) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    winners = {id(record): rule.name for record, rule in zip(records, first_match(records, rules), strict=True)}
    assert winners == {
        id(record): rule.name for record, rule in zip(shuffled, first_match(shuffled, rules), strict=True)
    }
