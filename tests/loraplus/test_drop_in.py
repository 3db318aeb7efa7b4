"""`create_loraplus_optimizer` against PEFT's own function: the same groups, the same weights bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from torch import nn

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.optimizer import create_loraplus_optimizer
from tests.support.models import ADAPTED as MODELS
from tests.support.models import bert, llama, train, with_lora

ARGUMENTS = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 5e-4, "loraplus_weight_decay": 0.1}

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"betas": (0.9, 0.99)}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    # min_8bit_size 1: these models are small, and every state is to be an 8-bit one
    "AdamW8bit": (bnb.optim.AdamW8bit, {"min_8bit_size": 1}),
}


def described(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[list[str], float, float]]:
    """Each group as (names of its tensors in order, lr, weight decay)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


def peft_with_32bit_embeddings(model: nn.Module, cls: Any, **arguments: Any) -> torch.optim.Optimizer:
    """PEFT's function, with the 32-bit state that it means to give trained embeddings set by hand."""
    optimizer = peft_optimizer(model, cls, **arguments)
    if issubclass(cls, bnb.optim.AdamW8bit):
        manager = copy.copy(bnb.optim.GlobalOptimManager.get_instance())
        manager.initialize()
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if "lora_embedding_" in name or "trainable_tokens" in name or isinstance(owner, nn.Embedding):
                manager.override_config(parameter, "optim_bits", 32)
        optimizer.mng = manager
    return optimizer


@pytest.fixture(autouse=True)
def clean_global_manager() -> Any:
    """PEFT's function registers modules with bitsandbytes' singleton; don't let one test's reach the next."""
    yield
    bnb.optim.GlobalOptimManager.get_instance().initialize()


# AdamW on every model; each other optimizer on those where PEFT's function treats it in a way of its own.
OTHERS = {
    "SGD": ["linears", "all_biases"],
    "AdamW8bit": ["linears", "embedding", "saved_embedding", "trainable_tokens"],
}


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        pytest.param(model, optimizer, marks=[] if model in OTHERS.get(optimizer, MODELS) else pytest.mark.slow)
        for model in MODELS
        for optimizer in OPTIMIZERS
    ],
)
def test_the_same_groups_and_the_same_weights_after_20_steps_as_peft(model: str, optimizer: str) -> None:
    cls, arguments = OPTIMIZERS[optimizer]
    ours, theirs = MODELS[model](), MODELS[model]()
    our_optimizer = create_loraplus_optimizer(ours, cls, **ARGUMENTS, **arguments)
    their_optimizer = peft_with_32bit_embeddings(theirs, cls, **ARGUMENTS, **arguments)
    assert described(ours, our_optimizer) == described(theirs, their_optimizer)

    before = {
        name: parameter.detach().clone() for name, parameter in ours.named_parameters() if parameter.requires_grad
    }
    assert train(ours, our_optimizer, 20) == train(theirs, their_optimizer, 20)
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, other[name]), name
    moved = [name for name, value in before.items() if not torch.equal(value, dict(ours.named_parameters())[name])]
    assert len(moved) > len(before) / 2  # two models that stand still would agree too


def test_ratio_one_trains_to_the_bits_of_one_group_without_any_ratio() -> None:
    plain, ours = with_lora(llama()), with_lora(llama())
    one_group = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    with_groups = create_loraplus_optimizer(
        ours, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=1.0, loraplus_weight_decay=0.1
    )
    assert train(plain, one_group, 20) == train(ours, with_groups, 20)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name


# where we differ from PEFT on purpose


def test_rms_norm_weights_do_not_decay() -> None:
    make = lambda: with_lora(llama(), target_modules=["q_proj"], modules_to_save=["input_layernorm"])  # noqa: E731
    ours, theirs = make(), make()
    mine = described(ours, create_loraplus_optimizer(ours, torch.optim.AdamW, **ARGUMENTS))
    peft = described(theirs, peft_optimizer(theirs, torch.optim.AdamW, **ARGUMENTS))
    norms = [name for name, p in ours.named_parameters() if p.requires_grad and "layernorm" in name]
    assert mine[3] == (norms, 1e-3 * 8.0, 0.0)
    assert mine[2][0] == [name for name in peft[2][0] if name not in norms]
    assert mine[:2] == peft[:2]


def test_an_adapter_with_lora_b_in_its_name_keeps_its_a_at_the_base_rate() -> None:
    from peft import LoraConfig

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="my_lora_B")
    (a, a_lr, _), _, (b, b_lr, _), _ = described(
        model, create_loraplus_optimizer(model, torch.optim.AdamW, **ARGUMENTS)
    )
    assert (len(a), a_lr, len(b), b_lr) == (2, 1e-3, 2, 8e-3)
    assert all(".lora_A.my_lora_B." in name for name in a)


def test_weight_decay_is_taken_for_what_it_says() -> None:
    model = with_lora(bert(), target_modules=["query"], bias="all")
    with pytest.warns(UserWarning, match="PEFT's function ignores it"):
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]
    with pytest.raises(UserError, match="contradict"):
        create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2, weight_decay=0.1, loraplus_weight_decay=0.2
        )


@pytest.mark.parametrize("name", ["lr", "loraplus_lr_ratio", "loraplus_lr_embedding"])
@pytest.mark.parametrize("value", [0, -3, float("nan"), float("inf"), None, "8"])
def test_rates_and_ratio_must_be_finite_and_above_zero(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        create_loraplus_optimizer(with_lora(llama()), torch.optim.AdamW, **{**ARGUMENTS, name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0"])
def test_weight_decay_must_be_finite_and_not_below_zero(value: Any) -> None:
    with pytest.raises(ValueError, match="loraplus_weight_decay must be"):
        create_loraplus_optimizer(
            with_lora(llama()), torch.optim.AdamW, **{**ARGUMENTS, "loraplus_weight_decay": value}
        )


# what PEFT's own published tests ask of its function, asked of ours


class SmallNet(nn.Module):
    """An embedding, a norm and two linears with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 20)
        self.layer_norm = nn.LayerNorm(20)
        self.lin0 = nn.Linear(20, 20)
        self.lin1 = nn.Linear(20, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(self.layer_norm(self.embedding(x)))))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("cls", [bnb.optim.Adam8bit, bnb.optim.AdamW8bit, torch.optim.AdamW])
def test_four_groups_with_rates_from_the_ratio(cls: Any, adapter: bool) -> None:
    model = with_lora(SmallNet(), target_modules=["lin0", "lin1", "embedding"], bias="all") if adapter else SmallNet()
    optimizer = create_loraplus_optimizer(
        model,
        cls,
        lr=5e-5,
        loraplus_lr_ratio=1.2,
        loraplus_lr_embedding=1e-6,
        eps=1e-6,
        betas=(0.9, 0.999),
        loraplus_weight_decay=0.0,
    )
    assert isinstance(optimizer, cls)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 1e-6, 5e-5 * 1.2, 5e-5 * 1.2]
    assert all(group["eps"] == 1e-6 and tuple(group["betas"]) == (0.9, 0.999) for group in optimizer.param_groups)
    assert [len(group["params"]) for group in optimizer.param_groups] == ([2, 2, 2, 3] if adapter else [3, 0, 0, 4])


def test_the_embedding_rate_defaults_to_1e_6_and_decay_to_none() -> None:
    model = with_lora(SmallNet(), target_modules=["lin0", "embedding"])
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-5, loraplus_lr_ratio=16)
    assert optimizer.param_groups[1]["lr"] == 1e-6
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_a_model_that_is_a_layer_itself() -> None:
    """A parameter without a module above it has no owner two names up; PEFT once failed there."""
    layer = nn.Linear(4, 4)
    optimizer = create_loraplus_optimizer(layer, torch.optim.AdamW, **ARGUMENTS)
    assert described(layer, optimizer) == described(layer, peft_optimizer(layer, torch.optim.AdamW, **ARGUMENTS))


def test_a_norm_over_two_dimensions_is_a_matrix_as_in_the_documented_table() -> None:
    model = nn.Sequential(nn.LayerNorm((2, 4)), nn.Linear(4, 4))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **ARGUMENTS)
    assert described(model, optimizer) == described(model, peft_optimizer(model, torch.optim.AdamW, **ARGUMENTS))
    assert described(model, optimizer)[0][0] == ["0.weight", "0.bias", "1.weight"]


def test_first_step_of_an_8_bit_optimizer_changes_lora_b_alone() -> None:
    model = with_lora(SmallNet(), target_modules=["lin0", "lin1"])
    optimizer = create_loraplus_optimizer(model, bnb.optim.Adam8bit, lr=5e-3, loraplus_lr_ratio=2.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randint(100, (2, 4, 10), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(x).permute(0, 3, 1, 2), x % 16)
    loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name}  # B is zero, so A has no gradient in the first step
