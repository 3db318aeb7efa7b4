"""The presets of conf/loraplus: what each does with every kind of trained tensor, and `peft` against PEFT's own
function.

A test for each row of what goes wrong elsewhere: the preset `peft` does as PEFT does, `default` and `roles` do what
they document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from torch import nn

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.grouping import assign, first_match
from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.loraplus.rules import Rule, parse_rules
from tests.loraplus.test_grouping import rule_lists, satisfies
from tests.support.models import ADAPTED, ConvNet, bert, llama, with_lora
from tests.support.presets import LR, preset

EMB = 1e-6
DECAY = 0.1
B = 8 * LR


def rates(model: nn.Module, rules: list[Rule]) -> dict[str, tuple[float, float]]:
    """End of each trained tensor's name -> (lr, weight decay), without a word on whether the ratio makes sense."""
    records = tensor_records(model)
    return {
        record.name: (rule.rate(LR), DECAY if rule.weight_decay is None else rule.weight_decay)
        for record, rule in zip(records, first_match(records, rules), strict=True)
    }


def by_role(model: nn.Module, name: str, **keys: Any) -> dict[str, tuple[float, float]]:
    """Role (with the owner for a magnitude) -> (lr, weight decay); a role's tensors have to agree."""
    found: dict[str, tuple[float, float]] = {}
    placed = rates(model, preset(name, **keys))
    for record in tensor_records(model):
        role = f"magnitude of {record.owner}" if record.role == "magnitude" else record.role
        assert found.setdefault(role, placed[record.name]) == placed[record.name]
    return found


def peft_rates(model: nn.Module) -> dict[str, tuple[float, float]]:
    optimizer = peft_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=8.0, loraplus_lr_embedding=EMB, loraplus_weight_decay=DECAY
    )
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


# `peft` is PEFT

ODD_MODELS: dict[str, Callable[[], nn.Module]] = {
    **ADAPTED,
    "saved_rms_norm": lambda: with_lora(llama(), target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
    "saved_batch_norm": lambda: with_lora(ConvNet(), target_modules=["head"], modules_to_save=["norm"]),
    "full_llama": llama,
    "full_convolutions": ConvNet,
    "vera": lambda: get_peft_model(llama(), VeraConfig(r=4, target_modules=["q_proj"])),
    "delora": lambda: get_peft_model(llama(), DeloraConfig(r=4, target_modules=["q_proj"])),
    "loha": lambda: get_peft_model(llama(), LoHaConfig(r=4, target_modules=["q_proj"])),
    "ia3": lambda: get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "adapter_called_my_lora_B": lambda: get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="my_lora_B"
    ),
    "unfrozen_embedding_below_lora": lambda: unfreeze(
        with_lora(llama(), target_modules=["q_proj", "embed_tokens"]), "embed_tokens.base_layer"
    ),
    "unfrozen_linear_below_lora": lambda: unfreeze(with_lora(bert(), target_modules=["query"]), "query.base_layer"),
}


def unfreeze(model: nn.Module, ending: str) -> nn.Module:
    for name, module in model.named_modules():
        if name.endswith(ending):
            module.requires_grad_(True)
    return model


@pytest.mark.parametrize("model", ODD_MODELS)
def test_the_peft_preset_is_peft_tensor_for_tensor(model: str) -> None:
    made = ODD_MODELS[model]()
    assert rates(made, preset("peft")) == peft_rates(made)


@pytest.mark.parametrize("model", sorted(ADAPTED.keys() - {"full_weights"}))  # where a ratio is refused
def test_the_peft_preset_gives_peft_s_groups_in_peft_s_order(model: str) -> None:
    made = ADAPTED[model]()
    optimizer = peft_optimizer(made, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=8.0)
    names = {id(p): name for name, p in made.named_parameters()}
    theirs = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups if group["params"]]
    ours = assign(tensor_records(made), preset("peft"), lr=LR, weight_decay=0.0).groups
    assert [[record.name for record in group.records] for group in ours] == theirs


# what `default` and `roles` do, row by row


def test_roles_train_saved_norms_and_biases_at_lr_where_default_has_the_rate_of_b() -> None:
    model = with_lora(llama(), target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    assert by_role(model, "peft")["norm"] == (B, DECAY)  # an RMSNorm decays there
    assert by_role(model, "default") == {
        "lora_A": (LR, DECAY),
        "lora_B": (B, DECAY),
        "norm": (B, 0.0),
        "saved_module": (LR, DECAY),
    }
    assert by_role(model, "roles") == {
        "lora_A": (LR, DECAY),
        "lora_B": (B, DECAY),
        "norm": (LR, 0.0),
        "saved_module": (LR, DECAY),
    }
    head = with_lora(bert(), target_modules=["query"], task_type="SEQ_CLS")
    assert by_role(head, "peft") == by_role(head, "default")
    assert by_role(head, "default")["bias"] == (B, 0.0)
    assert by_role(head, "roles")["bias"] == by_role(head, "none")["bias"] == (LR, 0.0)


@pytest.mark.parametrize(("targets", "owner"), [(["conv2d"], "Conv2d"), (["head"], "Linear")])
def test_dora_magnitudes_never_decay_whatever_their_shape(targets: list[str], owner: str) -> None:
    model = with_lora(ConvNet(), target_modules=targets, use_dora=True)
    role = f"magnitude of {owner}"
    assert by_role(model, "peft")[role] == ((LR, DECAY) if owner == "Conv2d" else (B, DECAY))
    assert by_role(model, "default")[role] == by_role(model, "absolute", lr_B=B)[role] == (B, 0.0)
    assert by_role(model, "roles")[role] == by_role(model, "none")[role] == (LR, 0.0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_model(bias: str) -> None:
    model = with_lora(bert(), target_modules=["query"], bias=bias)
    assert by_role(model, "peft")["bias"] == by_role(model, "default")["bias"] == (B, 0.0)
    assert by_role(model, "roles")["bias"] == by_role(model, "none")["bias"] == (LR, 0.0)


def test_roles_train_a_bias_of_lora_b_at_lr_where_default_has_the_rate_of_b() -> None:
    model = with_lora(bert(), target_modules=["query"], lora_bias=True)
    assert by_role(model, "default")["lora_B_bias"] == (B, 0.0)
    assert by_role(model, "roles")["lora_B_bias"] == (LR, 0.0)


def test_everything_of_a_lora_embedding_trains_at_the_embedding_rate() -> None:
    model = with_lora(llama(), use_dora=True, target_modules=["q_proj", "embed_tokens"])
    assert by_role(model, "peft")["magnitude of Embedding"] == (B, DECAY)
    for name in ("default", "roles", "absolute"):
        found = by_role(model, name)
        assert found["lora_embedding_A"] == found["lora_embedding_B"] == (EMB, DECAY)
        assert found["magnitude of Embedding"] == (EMB, 0.0)
    assert by_role(model, "none")["lora_embedding_A"] == (LR, DECAY)


def test_trainable_tokens_and_saved_embeddings_train_at_lr() -> None:
    tokens = with_lora(llama(), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    saved = with_lora(llama(), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    for name in ("peft", "default", "roles", "none"):
        assert by_role(tokens, name)["trainable_tokens"] == (LR, DECAY)
        assert by_role(saved, name)["saved_module"] == (LR, DECAY)


def test_roles_train_adalora_e_at_the_rate_of_b_where_default_has_lr() -> None:
    model = get_peft_model(llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    assert by_role(model, "peft") == by_role(model, "default")
    assert by_role(model, "default") == {"adalora_A": (LR, DECAY), "adalora_B": (B, DECAY), "adalora_E": (LR, DECAY)}
    assert by_role(model, "roles") == {"adalora_A": (LR, DECAY), "adalora_B": (B, DECAY), "adalora_E": (B, DECAY)}


def test_vera_is_split_by_roles_and_refused_elsewhere() -> None:
    model = get_peft_model(llama(), VeraConfig(r=4, target_modules=["q_proj"]))
    assert by_role(model, "roles") == {"vera_b": (B, DECAY), "vera_d": (LR, DECAY)}
    assert by_role(model, "peft") == {"vera_b": (B, DECAY), "vera_d": (B, DECAY)}
    for name in ("peft", "default"):
        with pytest.raises(
            UserError,
            match=r"every tensor of the adapter gets the ratio.*loraplus=roles for an adapter whose factors",
        ):
            assign(tensor_records(model), preset(name), lr=LR, weight_decay=DECAY)


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=4, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        VBLoRAConfig(r=4, target_modules=["q_proj"], vector_length=8, num_vectors=16),
        DeloraConfig(r=4, target_modules=["q_proj"]),
        LoraConfig(r=4, target_modules=["embed_tokens"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_where_the_ratio_does_nothing_it_is_refused(config: Any) -> None:
    records = tensor_records(get_peft_model(llama(), config))
    for name in ("default", "roles"):
        with pytest.raises(UserError, match="the LoRA\\+ ratio 8 has no effect here"):
            assign(records, preset(name), lr=LR, weight_decay=DECAY)
        assert assign(records, preset(name, ratio=1.0), lr=LR, weight_decay=DECAY).groups
    assert assign(records, preset("none"), lr=LR, weight_decay=DECAY).groups


def test_an_adapter_or_a_target_with_lora_b_in_its_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_Block = nn.Linear(8, 8)
            self.plain = nn.Linear(8, 8)

    target = get_peft_model(Net(), LoraConfig(r=2, target_modules=["lora_Block", "plain"]))
    adapter = get_peft_model(Net(), LoraConfig(r=2, target_modules=["plain"]), adapter_name="my_lora_B")
    for model in (target, adapter):
        for name in ("default", "roles"):
            assert by_role(model, name) == {"lora_A": (LR, DECAY), "lora_B": (B, DECAY)}
    wrong = {name: rate for name, rate in rates(target, preset("peft")).items() if "lora_A" in name}
    assert sorted(wrong.values()) == [(LR, DECAY), (B, DECAY)]
    with pytest.raises(UserError, match="every tensor of the adapter gets the ratio"):  # PEFT does that silently
        assign(tensor_records(adapter), preset("peft"), lr=LR, weight_decay=DECAY)


def test_no_group_is_empty_in_the_ordinary_case() -> None:
    groups = assign(tensor_records(with_lora(llama())), preset("default"), lr=LR, weight_decay=DECAY).groups
    assert [(group.name, group.lr, group.weight_decay) for group in groups] == [
        ("groupA", LR, DECAY),
        ("groupB", B, DECAY),
    ]


def test_absolute_rates_are_taken_as_they_are_and_lr_a_is_the_optimizer_s() -> None:
    model = with_lora(llama())
    assert by_role(model, "absolute", lr_B=3e-3) == {"lora_A": (LR, DECAY), "lora_B": (3e-3, DECAY)}
    assert by_role(model, "absolute", lr_A=1e-5, lr_B=3e-3) == {"lora_A": (1e-5, DECAY), "lora_B": (3e-3, DECAY)}


def test_rates_by_depth_go_together_with_the_ratio() -> None:
    """Layer-wise decay of rates: each layer's two rules stand ahead of the preset, the ratio in one of them."""
    extra = {}
    for layer, factor in ((0, 0.5), (1, 1.0)):
        extra[f"layer{layer}_B"] = {"pattern": rf"layers\.{layer}\.", "role": "lora_B", "lr_mult": factor, "ratio": 8.0}
        extra[f"layer{layer}_A"] = {"pattern": rf"layers\.{layer}\.", "lr_mult": factor}
    records = tensor_records(with_lora(llama()))
    groups = assign(records, preset("default"), lr=LR, weight_decay=DECAY, extra=parse_rules(extra)).groups
    assert {group.name: group.lr for group in groups} == {
        "layer0_B": B / 2,
        "layer0_A": LR / 2,
        "layer1_B": B,
        "layer1_A": LR,
    }


def test_each_preset_has_only_the_keys_it_uses() -> None:
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    for name, key in (("none", "ratio"), ("none", "lr_embedding"), ("absolute", "ratio"), ("default", "lr_A")):
        with pytest.raises((ConfigAttributeError, ConfigKeyError)):
            preset(name, **{key: 16})


def test_a_ratio_that_is_null_is_no_silent_plain_lora() -> None:
    with pytest.raises(UserError, match="ratio: must be a number, got None"):
        preset("default", ratio=None)


# for any family of models

names = st.sampled_from(["lora_A", "my_lora_B", "lora_Block", "bias", "attn_bias", "norm", "q", "k", "score"])
layers = st.sampled_from(["linear", "no_bias", "layer_norm", "rms_norm", "embedding", "conv"])
trees = st.dictionaries(
    names,
    st.recursive(layers, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=5),
    min_size=1,
    max_size=4,
)


class Tree(nn.Module):
    """Modules nested by odd names."""

    def __init__(self, layout: Any, backwards: bool = False) -> None:
        super().__init__()
        for name, below in sorted(layout.items(), reverse=backwards):
            self.add_module(name, self.leaf(below) if isinstance(below, str) else Tree(below, backwards))

    @staticmethod
    def leaf(kind: str) -> nn.Module:
        return {
            "linear": lambda: nn.Linear(4, 4),
            "no_bias": lambda: nn.Linear(4, 4, bias=False),
            "layer_norm": lambda: nn.LayerNorm(4),
            "rms_norm": lambda: nn.RMSNorm(4),
            "embedding": lambda: nn.Embedding(5, 4),
            "conv": lambda: nn.Conv2d(2, 2, 3),
        }[kind]()


def family(layout: Any, adapters: list[str], options: dict[str, Any], backwards: bool = False) -> Any:
    """A generated model with every linear, embedding and convolution adapted, and norms saved if the options say so."""
    # "target" makes sure that there is something to adapt, "z" that there is a norm to save
    model: Any = Tree({"root": layout, "target": "linear", "z": "rms_norm"}, backwards)
    if len(adapters) > 1:  # PEFT takes saved modules and trained biases with one active adapter only
        options = {"use_dora": options["use_dora"]}
    targets = sorted(
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d))
    )
    for index, adapter in enumerate(adapters):
        config = LoraConfig(r=2, target_modules=targets, **options)
        if index == 0:
            model = get_peft_model(model, config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
    model.base_model.set_adapter(adapters)
    return model


options_ = st.fixed_dictionaries(
    {
        "use_dora": st.booleans(),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "modules_to_save": st.sampled_from([None, ["z"]]),
    }
)
adapters_ = st.lists(
    st.sampled_from(["default", "my_lora_B", "bias", "lora_A"]), min_size=1, max_size=2, unique=True
).map(sorted)


@settings(max_examples=60)
@given(trees, adapters_, options_)
def test_in_any_family_the_peft_preset_is_peft(layout: Any, adapters: list[str], options: dict[str, Any]) -> None:
    model = family(layout, adapters, options)
    assert rates(model, preset("peft")) == peft_rates(model)


@settings(max_examples=60)
@given(trees, adapters_, options_, rule_lists())
def test_in_any_family_any_rules_place_each_tensor_once_by_the_first_that_matches(
    layout: Any, adapters: list[str], options: dict[str, Any], rules: list[Rule]
) -> None:
    model = family(layout, adapters, options)
    groups = assign(tensor_records(model), rules, lr=LR, weight_decay=DECAY).groups
    placed = [record.name for group in groups for record in group.records]
    assert sorted(placed) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for group in groups:
        for record in group.records:
            first = next(rule for rule in rules if satisfies(record, rule))
            assert (group.name, group.lr) == (first.group, first.rate(LR))


@settings(max_examples=60)
@given(trees, adapters_, options_, st.sampled_from(["default", "roles", "absolute", "none"]), st.floats(1.5, 64))
def test_in_any_family_each_tensor_has_one_group_and_the_order_of_modules_decides_nothing(
    layout: Any, adapters: list[str], options: dict[str, Any], name: str, ratio: float
) -> None:
    keys = {"ratio": ratio} if name in ("default", "roles") else {}
    rules = preset(name, **keys)
    placed = []
    for backwards in (False, True):
        model = family(layout, adapters, options, backwards)
        groups = assign(tensor_records(model), rules, lr=LR, weight_decay=DECAY).groups
        assert all(group.records for group in groups)
        flat = {
            record.name: (group.name, group.lr, group.weight_decay, record)
            for group in groups
            for record in group.records
        }
        assert sorted(flat) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
        assert sum(len(group.records) for group in groups) == len(flat)
        placed.append(flat)
    assert placed[0] == placed[1]
    for _, lr, weight_decay, record in placed[0].values():
        undecayed = record.role in ("bias", "norm", "magnitude") or (record.ndim == 1 and name != "roles")
        assert weight_decay == (0.0 if undecayed else DECAY)
        of_embedding = record.role.startswith("lora_embedding") or (
            record.role == "magnitude" and record.owner == "Embedding"
        )
        raised = record.role == "lora_B" or (name in ("default", "absolute") and undecayed)
        if of_embedding and name != "none":
            assert lr == EMB
        elif raised and name != "none":
            assert lr == (4e-4 if name == "absolute" else LR * ratio)
        else:
            assert lr == LR
