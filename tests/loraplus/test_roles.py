"""Roles: which tensor is what, from the layer that owns it, for every kind of adapter PEFT has."""

from __future__ import annotations

from typing import Any

import pytest
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftType,
    PromptTuningConfig,
    PveraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.loraplus.rules import TensorRecord
from tests.support.models import ConvNet, bert, gpt2, llama, mixtral, with_lora
from tests.support.peft_methods import LORAPLUS_SUPPORT, SPLIT


def roles(model: nn.Module) -> dict[str, str]:
    """End of the name behind the layers -> role; the longest common prefix tells nothing here."""
    return {record.name.removeprefix("base_model.model."): record.role for record in tensor_records(model)}


def of_role(model: nn.Module, role: str) -> list[TensorRecord]:
    return [record for record in tensor_records(model) if record.role == role]


def kinds(model: nn.Module) -> set[tuple[str, str]]:
    return {(record.role, record.owner) for record in tensor_records(model)}


# every kind of LoRA


@pytest.mark.parametrize(
    ("model", "config", "expected"),
    [
        (llama, {}, {("lora_A", "Linear"), ("lora_B", "Linear")}),
        (llama, {"use_rslora": True}, {("lora_A", "Linear"), ("lora_B", "Linear")}),
        (
            llama,
            {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
            {
                *((role, "Linear") for role in ("lora_A", "lora_B", "magnitude")),
                *((role, "Embedding") for role in ("lora_embedding_A", "lora_embedding_B", "magnitude")),
            },
        ),
        (
            bert,
            {"target_modules": ["query"], "lora_bias": True},
            {(f"lora_{x}", "Linear") for x in ("A", "B", "B_bias")},
        ),
        (gpt2, {"target_modules": ["c_attn"]}, {("lora_A", "Conv1D"), ("lora_B", "Conv1D")}),
        (
            ConvNet,
            {"target_modules": ["conv1d", "conv2d", "conv3d"], "use_dora": True},
            {(role, f"Conv{n}d") for role in ("lora_A", "lora_B", "magnitude") for n in (1, 2, 3)},
        ),
        (
            mixtral,
            {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            {("lora_A", "MixtralExperts"), ("lora_B", "MixtralExperts")},
        ),
    ],
)
def test_lora_on_every_kind_of_layer(model: Any, config: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    assert kinds(with_lora(model(), **config)) == expected


def test_lora_on_torchs_attention_has_a_pair_for_it_and_one_for_its_output_layer() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert kinds(with_lora(model, target_modules=["0"])) == {
        ("lora_A", "MultiheadAttention"),
        ("lora_B", "MultiheadAttention"),
        ("lora_A", "NonDynamicallyQuantizableLinear"),
        ("lora_B", "NonDynamicallyQuantizableLinear"),
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_linears_report_their_own_class_and_that_they_are_linears(bits: int) -> None:
    import bitsandbytes as bnb

    linear = (
        bnb.nn.Linear4bit(16, 16, bias=False)
        if bits == 4
        else bnb.nn.Linear8bitLt(16, 16, bias=False, has_fp16_weights=False)
    )
    records = tensor_records(with_lora(nn.Sequential(linear), target_modules=["0"]))
    assert [record.role for record in records] == ["lora_A", "lora_B"]
    assert {record.owner for record in records} == {type(linear).__name__}
    assert all("torch.nn.modules.linear.Linear" in record.owner_classes for record in records)


@pytest.mark.parametrize(("bias", "count"), [("all", 9), ("lora_only", 1)])
def test_biases_of_the_base_model(bias: str, count: int) -> None:
    model = with_lora(bert(), target_modules=["query"], bias=bias)
    biases = of_role(model, "bias")
    assert {record.adapter for record in biases} == {None}
    assert len(biases) == sum(name.endswith("bias") and p.requires_grad for name, p in model.named_parameters())
    assert len(biases) >= count
    assert {"lora_A", "lora_B", "bias"} == set(roles(model).values())


def test_saved_modules_split_into_weights_biases_and_norms() -> None:
    model = with_lora(llama(), target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"])
    saved = {
        record.owner: (record.role, record.trained_embedding)
        for record in tensor_records(model)
        if "modules_to_save" in record.name
    }
    assert saved == {
        "Linear": ("saved_module", False),
        "Embedding": ("saved_module", True),
        "LlamaRMSNorm": ("norm", False),
    }
    head = with_lora(bert(), target_modules=["query"], task_type="SEQ_CLS")
    assert roles(head)["classifier.modules_to_save.default.weight"] == "saved_module"
    assert roles(head)["classifier.modules_to_save.default.bias"] == "bias"


def test_trainable_tokens_inside_lora_and_alone() -> None:
    with_tokens = with_lora(llama(), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    alone = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]))
    tied = with_lora(
        llama(tie_word_embeddings=True), target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}
    )
    for model in (with_tokens, alone, tied):
        (record,) = of_role(model, "trainable_tokens")
        assert (record.owner, record.shape, record.adapter, record.trained_embedding) == (
            "Embedding",
            (2, 16),
            "default",
            True,
        )


# other methods of PEFT


def test_adalora_and_vera_have_roles_of_their_own_and_tell_what_starts_at_zero() -> None:
    adalora = get_peft_model(llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    assert kinds(adalora) == {(f"adalora_{factor}", "Linear") for factor in "ABE"}
    assert {record.role: record.starts_at_zero for record in tensor_records(adalora)} == {
        "adalora_A": False,
        "adalora_B": False,
        "adalora_E": True,
    }
    # PVERA's input vector holds a mean and a variance for each of its r entries.
    for config, length in (
        (VeraConfig(r=8, target_modules=["q_proj"]), 8),
        (PveraConfig(r=8, target_modules=["q_proj"]), 16),
    ):
        vera = get_peft_model(llama(), config)
        assert {(r.role, r.shape[0], r.starts_at_zero) for r in tensor_records(vera)} == {
            ("vera_b", 16, True),
            ("vera_d", length, False),
        }


def test_methods_without_a_pair_have_other_tensors_only() -> None:
    for config in (
        LoHaConfig(target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        assert {record.role for record in tensor_records(get_peft_model(llama(), config))} == {"other"}
    assert kinds(get_peft_model(bert(), LNTuningConfig(target_modules=["LayerNorm"]))) == {
        ("norm", "LayerNorm"),
        ("bias", "LayerNorm"),
    }
    assert kinds(get_peft_model(llama(), HiraConfig(target_modules=["q_proj"]))) == {
        ("lora_A", "Linear"),
        ("lora_B", "Linear"),
    }


def test_every_method_of_peft_is_split_or_declared_to_have_nothing_to_split() -> None:
    assert {peft_type.value for peft_type in PeftType} == set(LORAPLUS_SUPPORT)
    assert all(reason == SPLIT or len(reason) > 10 for reason in LORAPLUS_SUPPORT.values())


SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_len": 2, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "C3A": {"block_size": 8},
    "MISS": {"r": 4},
    "OFT": {"r": 2, "oft_block_size": 0},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"r": 2},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 16},
}
"""What a method needs beside its defaults on a layer of 32 x 32."""


def methods() -> list[tuple[str, Any]]:
    """PEFT's methods that adapt linears by name; not BOFT (it compiles into the user's cache)."""
    import inspect

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return [
        (peft_type.value, config_class)
        for peft_type, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if "target_modules" in inspect.signature(config_class).parameters
        and peft_type.value not in ("BOFT", "TRAINABLE_TOKENS")
    ]


@pytest.mark.parametrize(("name", "config_class"), methods())
def test_declared_support_is_what_the_layers_show(name: str, config_class: Any) -> None:
    try:
        config = config_class(**{"target_modules": ["q_proj", "v_proj"], **SMALL.get(name, {})})
    except ImportError as error:  # AdaMSS wants scikit-learn
        pytest.skip(str(error))
    model = get_peft_model(llama(hidden=32, layers=1), config)
    records = tensor_records(model)
    sides = {"lora_A", "lora_B", "adalora_A", "adalora_B", "vera_b", "vera_d"}
    assert bool({record.role for record in records} & sides) is (LORAPLUS_SUPPORT[name] == SPLIT)
    assert [record.name for record in records] == [n for n, p in model.named_parameters() if p.requires_grad]


# which factor starts at zero


@pytest.mark.parametrize(
    ("init", "a", "b"),
    [
        (True, False, True),
        ("gaussian", False, True),
        ("pissa", False, False),
        ("olora", False, False),
        ("orthogonal", False, False),
    ],
)
def test_the_zero_factor_follows_from_the_initialisation(init: Any, a: bool, b: bool) -> None:
    records = tensor_records(with_lora(llama(), target_modules=["q_proj"], init_lora_weights=init))
    assert {record.starts_at_zero for record in records if record.role == "lora_A"} == {a}
    assert {record.starts_at_zero for record in records if record.role == "lora_B"} == {b}


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora", "orthogonal", "mica", False])
def test_what_is_said_to_start_at_zero_is_zero(init: Any) -> None:
    model = with_lora(llama(), target_modules=["q_proj"], init_lora_weights=init)
    values = dict(model.named_parameters())
    for record in tensor_records(model):
        assert record.starts_at_zero is not bool(values[record.name].any())


def test_embeddings_start_the_other_way_round() -> None:
    records = tensor_records(with_lora(llama(), target_modules=["embed_tokens"]))
    assert {record.role: record.starts_at_zero for record in records} == {
        "lora_embedding_A": True,
        "lora_embedding_B": False,
    }


def test_hand_written_factors_are_read_where_there_are_values() -> None:
    model = with_lora(llama(), target_modules=["q_proj"], init_lora_weights=False)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            nn.init.zeros_(parameter)
    assert {record.role: record.starts_at_zero for record in tensor_records(model)} == {"lora_A": True, "lora_B": False}
    assert {record.starts_at_zero for record in tensor_records(model.to("meta"))} == {None}


# names decide nothing


def test_adapters_and_targets_with_odd_names() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_Block = nn.Linear(8, 8)
            self.bias_proj = nn.Linear(8, 8, bias=False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 8, bias=False)})

    model = get_peft_model(
        Block(), LoraConfig(r=2, target_modules=["lora_Block", "bias_proj"]), adapter_name="my_lora_B"
    )
    model.base_model.model.lora_A["default"].weight.requires_grad_(True)
    assert roles(model) == {
        "lora_Block.lora_A.my_lora_B.weight": "lora_A",
        "lora_Block.lora_B.my_lora_B.weight": "lora_B",
        "bias_proj.lora_A.my_lora_B.weight": "lora_A",
        "bias_proj.lora_B.my_lora_B.weight": "lora_B",
        "lora_A.default.weight": "other",
    }
    assert {record.adapter for record in tensor_records(model) if record.role != "other"} == {"my_lora_B"}


def test_a_module_and_a_tensor_under_two_names_count_once_by_the_first() -> None:
    shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared, tied), "three": nn.Linear(4, 4)})
    model["three"].weight = tied.weight
    assert [record.name for record in tensor_records(model)] == [name for name, _ in model.named_parameters()]
    assert len(tensor_records(model)) == 5


def test_several_adapters_and_a_frozen_reference() -> None:
    model = with_lora(llama(), target_modules=["q_proj"])
    model.add_adapter("lora_B", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights="pissa"))
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "lora_B"])
    model.base_model.set_requires_grad("ref", False)
    found = {(r.adapter, r.role, r.starts_at_zero) for r in tensor_records(model)}
    assert found == {
        ("default", "lora_A", False),
        ("default", "lora_B", True),
        ("lora_B", "lora_A", False),
        ("lora_B", "lora_B", False),
    }
