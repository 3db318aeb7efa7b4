"""Roles where there is no adapter to tell them by, and for any family of nested modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.roles import tensor_records
from tests.support.models import llama


class RMS_norm(nn.Module):  # noqa: N801 - Wan calls its own so
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


class MambaRMSNormGated(RMS_norm):
    pass


class Unnamed(nn.LayerNorm):
    pass


class RelativeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.ones(4, 2))
        self.q_bias = nn.Parameter(torch.ones(4))


class NormHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LayerNorm(4), ["norm", "bias"]),
        (nn.LayerNorm((2, 4)), ["norm", "bias"]),
        (nn.RMSNorm(4), ["norm"]),
        (nn.GroupNorm(2, 4), ["norm", "bias"]),
        (nn.BatchNorm2d(4), ["norm", "bias"]),
        (nn.InstanceNorm1d(4, affine=True), ["norm", "bias"]),
        (nn.SyncBatchNorm(4), ["norm", "bias"]),
        (Unnamed(4), ["norm", "bias"]),
        (RMS_norm(), ["norm"]),
        (MambaRMSNormGated(), ["norm"]),
        (NormHead(), ["other"]),
        (RelativeAttention(), ["other", "bias"]),
        (nn.LSTM(2, 2), ["other", "other", "bias", "bias"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["other", "bias", "bias", "bias", "other", "bias"]),
    ],
)
def test_norms_and_biases_by_class_and_attribute(layer: nn.Module, expected: list[str]) -> None:
    assert [record.role for record in tensor_records(nn.ModuleDict({"bias_norm": layer}))] == expected


def test_a_model_without_peft() -> None:
    model = llama()
    records = tensor_records(model)
    assert [record.name for record in records] == [name for name, _ in model.named_parameters()]
    assert {record.role for record in records} == {"other", "norm"}
    assert [record.name for record in records if record.trained_embedding] == ["model.embed_tokens.weight"]


def test_wrapped_in_fsdp_is_too_late() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(UserError, match="make the groups before wrapping"):
        tensor_records(nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2))))


def test_roles_and_shapes_are_known_on_the_meta_device() -> None:
    config = llama().config
    with torch.device("meta"):
        model = type(llama())(config)
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    records = tensor_records(peft_model)
    assert {(record.role, record.shape) for record in records} == {("lora_A", (4, 16)), ("lora_B", (16, 4))}


# for any family of models

names = st.sampled_from(["lora_A", "lora_B", "lora_Block", "bias", "norm", "base_layer", "modules_to_save", "q", "Ä"])


class Tree(nn.Module):
    """Modules nested by odd names, with linears, norms and embeddings as leaves; two names may hold one module."""

    def __init__(self, layout: Any, shared: nn.Module) -> None:
        super().__init__()
        for name, below in layout.items():
            leaf = {
                "linear": lambda: nn.Linear(4, 4),
                "norm": lambda: nn.LayerNorm(4),
                "embed": lambda: nn.Embedding(5, 4),
            }
            child = shared if below == "shared" else leaf[below]() if isinstance(below, str) else Tree(below, shared)
            self.add_module(name, child)


leaves = st.sampled_from(["linear", "linear", "norm", "embed", "shared"])
layouts = st.dictionaries(
    names,
    st.recursive(leaves, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=6),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40)
@given(
    layouts,
    st.lists(st.sampled_from(["default", "my_lora_B", "bias", "lora_A"]), min_size=1, max_size=2, unique=True),
    st.booleans(),
)
def test_records_are_the_trained_parameters_in_order_with_the_roles_of_their_owners(
    layout: Any, adapters: list[str], dora: bool
) -> None:
    model: Any = Tree({"root": layout, "target": "linear", "table": "embed"}, nn.Linear(4, 4))
    targets = sorted({name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))})
    for adapter in adapters:
        config = LoraConfig(r=2, target_modules=targets, use_dora=dora)
        if adapter == adapters[0]:
            model = get_peft_model(model, config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
    model.base_model.set_adapter(adapters)
    records = tensor_records(model)
    assert [record.name for record in records] == [name for name, p in model.named_parameters() if p.requires_grad]
    expected = {}
    for module in model.modules():
        for attribute, role in (
            ("lora_A", "lora_A"),
            ("lora_B", "lora_B"),
            ("lora_embedding_A", "lora_embedding_A"),
            ("lora_embedding_B", "lora_embedding_B"),
            ("lora_magnitude_vector", "magnitude"),
        ):
            holder = getattr(module, attribute, None) if hasattr(module, "lora_dropout") else None
            for parameter in holder.parameters() if holder is not None else ():
                expected[id(parameter)] = role
    parameters = dict(model.named_parameters())
    assert {record.name: record.role for record in records} == {
        record.name: expected[id(parameters[record.name])] for record in records
    }
    assert {record.adapter for record in records} == set(adapters)
