"""Groups into optimizers: which classes can, what they are built from, and the state that 8-bit ones keep."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, UserError
from loraplus_hydra.loraplus.grouping import assign
from loraplus_hydra.loraplus.optimizer import build_optimizer, create_loraplus_optimizer, group_parameters
from loraplus_hydra.loraplus.optimizer_check import ignored_rates, optimizer_problems
from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.loraplus.rules import Rule
from tests.conftest import Finished
from tests.support.models import ConvNet, llama, train, with_lora
from tests.support.presets import CONF, LR, arguments, preset
from tests.support.rate_breakers import FirstRates, OneGroup, OneRate

OPTIMIZERS = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))
MADE_FOR_LORA = ("lora_fa", "riemannian_adamw", "schedulefree_adamw")  # test_lora_optimizers.py
RULES = [Rule("groupB", role=("lora_B",), ratio=8.0), Rule("groupA")]


def build(model: nn.Module, cls: Any, rules: list[Rule] = RULES, **kwargs: Any) -> torch.optim.Optimizer:
    groups = assign(tensor_records(model), rules, lr=LR, weight_decay=kwargs.pop("weight_decay", 0.0)).groups
    return build_optimizer(cls, groups, model.named_parameters(), kwargs)


# the optimizers of conf/optimizer


def test_the_documented_optimizers_are_there() -> None:
    assert {
        *("adamw", "adam", "sgd", "adafactor", "adamw8bit", "adam8bit", "paged_adamw8bit", "paged_adam8bit"),
        *("paged_adamw32bit", "lion", "lion8bit", "muon", *MADE_FOR_LORA),
    } == set(OPTIMIZERS)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in MADE_FOR_LORA])
def test_each_takes_two_steps_under_the_default_preset(name: str) -> None:
    keys = arguments("optimizer", name)
    cls, lr, weight_decay = locate(keys.pop("_target_")), keys.pop("lr"), keys.pop("weight_decay")
    assert optimizer_problems(cls, keys) == []
    model = with_lora(llama())
    groups = assign(tensor_records(model), preset("default", ratio=16.0), lr=lr, weight_decay=weight_decay).groups
    optimizer = build_optimizer(cls, groups, model.named_parameters(), keys)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("groupA", lr), ("groupB", lr * 16.0)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, optimizer, 2)
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not still


def test_adamw_is_fused() -> None:
    assert arguments("optimizer", "adamw")["fused"] is True


@pytest.mark.parametrize("name", ["adam8bit", "adamw8bit"])
def test_decay_is_decoupled_in_both_8_bit_adams(name: str) -> None:
    """What the YAML says of Adam8bit: a gradient of zero and a decay shrink the weight by lr x decay, as AdamW does."""
    cls = locate(arguments("optimizer", name)["_target_"])
    weight = nn.Parameter(torch.ones(8))
    optimizer = cls([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(8)
    optimizer.step()
    assert torch.allclose(weight, torch.full((8,), 1 - 0.1 * 0.5))


def test_muon_says_which_tensors_are_no_matrices() -> None:
    model = with_lora(ConvNet(), target_modules=["conv2d", "head"])
    with pytest.raises(
        UserError, match=r"Muon can only train matrices.*conv2d\.lora_A\.default\.weight \(4-D\).*optimizer=adamw"
    ):
        build(model, torch.optim.Muon)


# classes that can't


class Prodigy(torch.optim.Optimizer):
    """Stands in for prodigyopt's."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})


class DAdaptAdam(Prodigy):
    pass


class MyProdigy(Prodigy):
    pass


@pytest.mark.parametrize(
    ("cls", "kwargs", "reason"),
    [
        (torch.optim.LBFGS, {}, "LBFGS can't be used: it accepts only one parameter group"),
        (torch.optim.Adafactor, {}, "B's update 0.08 of A's"),
        (torch.optim.SparseAdam, {}, "only sparse gradients"),
        (torch.optim.Rprop, {}, "step size for each weight"),
        (Adafactor, {}, "relative_step computes the rate"),
        (Adafactor, {"relative_step": False}, "scale_parameter scales each update"),
        (Prodigy, {}, "Prodigy can't be used: it chooses its rate itself"),
        (DAdaptAdam, {}, "DAdaptAdam can't be used: it chooses its rate itself"),
        (MyProdigy, {}, "MyProdigy can't be used: it chooses its rate itself"),
        (nn.Linear, {}, "torch.nn.modules.linear.Linear is not a subclass of torch.optim.Optimizer"),
        (print, {}, "not a subclass of torch.optim.Optimizer"),
        ("adamw", {}, "not a subclass of torch.optim.Optimizer"),
        (torch.optim.AdamW, {"beta": (0.9, 0.99)}, "takes no argument 'beta' (did you mean 'betas'?)"),
        (bnb.optim.Lion8bit, {"eps": 1e-8}, "Lion8bit takes no argument 'eps'"),
    ],
)
def test_what_cannot_is_refused_by_name_with_the_reason(cls: Any, kwargs: dict[str, Any], reason: str) -> None:
    assert reason in "\n".join(optimizer_problems(cls, kwargs))
    with pytest.raises(UserError) as caught:
        build(with_lora(llama(layers=1)), cls, **kwargs)
    assert reason in str(caught.value)


def test_a_needed_argument_is_asked_for() -> None:
    class Needy(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, total: int) -> None:
            super().__init__(params, lr)

    assert optimizer_problems(Needy, {}) == ["Needy needs an argument 'total'"]
    assert optimizer_problems(Needy, {"total": 3}) == []


def test_what_the_class_itself_refuses_is_told() -> None:
    with pytest.raises(UserError, match="SGD refuses these parameters or arguments: Nesterov"):
        build(with_lora(llama(layers=1)), torch.optim.SGD, nesterov=True)


# groups


def test_groups_carry_names_rates_and_settings() -> None:
    model = with_lora(llama(layers=1), target_modules=["q_proj"])
    rules = {"groupB": {"role": "lora_B", "ratio": 4, "betas": [0.8, 0.9]}, "groupA": {"weight_decay": 0.1}}
    groups = group_parameters(model, rules, lr=1e-3, weight_decay=0.2)
    parameters = dict(model.named_parameters())
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = f"{prefix}.lora_A.default.weight", f"{prefix}.lora_B.default.weight"
    assert groups == [
        {"name": "groupA", "params": [parameters[a]], "param_names": [a], "lr": 1e-3, "weight_decay": 0.1},
        {
            "name": "groupB",
            "params": [parameters[b]],
            "param_names": [b],
            "lr": 4e-3,
            "weight_decay": 0.2,
            "betas": (0.8, 0.9),
        },
    ]
    optimizer = torch.optim.AdamW(groups)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.8, 0.9)]


def test_extra_rules_of_group_parameters_stand_ahead() -> None:
    model = with_lora(llama(layers=1), target_modules=["q_proj", "v_proj"])
    groups = group_parameters(model, RULES, lr=1e-3, extra_rules={"values": {"pattern": "v_proj", "lr": 1e-4}})
    assert {group["name"]: len(group["params"]) for group in groups} == {"groupA": 1, "groupB": 1, "values": 2}
    with pytest.raises(ConfigErrors, match=r"loraplus\.extra_rules\.values\.role"):
        group_parameters(model, RULES, lr=1e-3, extra_rules={"values": {"role": "v"}})


def test_a_setting_that_the_class_does_not_have_is_an_error() -> None:
    model = with_lora(llama(layers=1))
    rules = [Rule("groupB", role=("lora_B",), settings={"ratoi": 8}), Rule("groupA")]
    with pytest.raises(UserError, match=r"rule groupB: AdamW has no setting 'ratoi' \(did you mean 'ratio'\?\)"):
        build(model, torch.optim.AdamW, rules)


def test_weight_decay_for_a_class_without_is_an_error() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 1e-3) -> None:
            super().__init__(params, {"lr": lr})

        def step(self, closure: Any = None) -> None:
            return None

    model = with_lora(llama(layers=1))
    with pytest.raises(UserError, match=r"Plain has no weight decay, but 0\.1 is set"):
        build(model, Plain, weight_decay=0.1)
    assert "weight_decay" not in build(model, Plain).param_groups[0]


class OneDecay(torch.optim.Optimizer):
    """Has one decay for all groups, which its groups don't hold."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        self.decay = weight_decay
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        return None


def test_setting_that_the_class_has_once_for_all_groups_is_an_error() -> None:
    model = with_lora(llama(layers=1))
    rules = [Rule("b", role=("lora_B",), settings={"min_8bit_size": 10**9}), Rule("a")]
    with pytest.raises(UserError, match="rule b: AdamW8bit has one `min_8bit_size` for all groups"):
        build(model, bnb.optim.AdamW8bit, rules)
    with pytest.raises(UserError, match="OneDecay has one `weight_decay` for all groups"):
        build(model, OneDecay, weight_decay=0.3)
    assert build(model, OneDecay).decay == 0  # type: ignore[attr-defined]  # as the table shows it


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in MADE_FOR_LORA])
def test_documented_optimizers_have_a_decay_for_each_group(name: str) -> None:
    keys = {**arguments("optimizer", name), "weight_decay": 0.1}
    rules = [Rule("groupB", role=("lora_B",), ratio=8.0, weight_decay=0.2), Rule("groupA")]
    groups = build(with_lora(llama(layers=1)), locate(keys.pop("_target_")), rules, **keys).param_groups
    assert {group["name"]: group["weight_decay"] for group in groups} == {"groupB": 0.2, "groupA": 0.1}


def test_names_that_changed_are_noticed() -> None:
    model = with_lora(llama(layers=1))
    groups = assign(tensor_records(model), RULES, lr=LR, weight_decay=0.0).groups
    with pytest.raises(UserError, match=r"the model has no parameter base_model.*names changed"):
        build_optimizer(torch.optim.AdamW, groups, nn.ModuleDict({"x": model}).named_parameters(), {})


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, bnb.optim.AdamW8bit])
def test_ratio_one_gives_the_bits_of_plain_lora(cls: Any) -> None:
    """`loraplus=default loraplus.ratio=1` against `loraplus=none`, with vectors that must not decay."""
    losses = []
    for rules in (preset("default", ratio=1.0), preset("none")):
        model = with_lora(llama(), use_dora=True, modules_to_save=["norm"])
        optimizer = build(model, cls, rules, weight_decay=0.1)
        losses.append((train(model, optimizer, 20), [p.detach().clone() for p in model.parameters()]))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))


# 32-bit state for embeddings

EIGHT_BIT = [
    bnb.optim.Adam8bit,
    bnb.optim.AdamW8bit,
    bnb.optim.PagedAdam8bit,
    bnb.optim.PagedAdamW8bit,
    bnb.optim.Lion8bit,
]
BIG = {
    "hidden": 64,
    "layers": 1,
    "vocabulary": 256,
}  # rank 64: every matrix has 4096 entries or more, so none is too small for 8 bits


def big(**config: Any) -> nn.Module:
    return with_lora(llama(**BIG), r=64, **{"target_modules": ["q_proj", "embed_tokens"], **config})


def state_dtypes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, set[torch.dtype]]:
    """Role -> dtypes of the state's first tensor."""
    found: dict[str, set[torch.dtype]] = {}
    parameters = dict(model.named_parameters())
    for record in tensor_records(model):
        if record.numel >= 4096:
            found.setdefault(record.role, set()).add(optimizer.state[parameters[record.name]]["state1"].dtype)
    return found


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("cls", EIGHT_BIT)
def test_trained_embeddings_keep_32_bit_state_and_the_rest_8_bit(cls: Any) -> None:
    model = big(modules_to_save=["lm_head"])
    optimizer = build(model, cls, preset("default"))
    train(model, optimizer, 1)
    assert state_dtypes(model, optimizer) == {
        "lora_embedding_A": {torch.float32},
        "lora_embedding_B": {torch.float32},
        "lora_A": {torch.uint8},
        "lora_B": {torch.uint8},
        "saved_module": {torch.uint8},
    }


def test_small_tensors_keep_32_bit_state_as_bitsandbytes_has_it() -> None:
    model = with_lora(llama(**BIG), r=4, target_modules=["q_proj"])
    optimizer = build(model, bnb.optim.AdamW8bit)
    train(model, optimizer, 1)
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_full_embeddings_and_trainable_tokens_keep_32_bit_state_too() -> None:
    saved = big(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    tokens = big(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": list(range(70))})
    for model, role in ((saved, "saved_module"), (tokens, "trainable_tokens")):
        for make in (
            lambda m: build(m, bnb.optim.AdamW8bit),
            lambda m: create_loraplus_optimizer(m, bnb.optim.AdamW8bit, lr=LR, loraplus_lr_ratio=8),
        ):
            optimizer = make(model)
            train(model, optimizer, 1)
            dtypes = state_dtypes(model, optimizer)
            assert dtypes == {role: {torch.float32}, "lora_A": {torch.uint8}, "lora_B": {torch.uint8}}


def test_bitsandbytes_singleton_is_left_alone_and_leaves_us_alone() -> None:
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    for with_embedding in (True, False, True):
        model = big() if with_embedding else big(target_modules=["q_proj"])
        optimizer = build(model, bnb.optim.AdamW8bit, preset("default"))
        train(model, optimizer, 1)
        dtypes = state_dtypes(model, optimizer)
        assert (dtypes["lora_A"], dtypes["lora_B"]) == ({torch.uint8}, {torch.uint8})
        assert ("lora_embedding_A" in dtypes) is with_embedding
        assert optimizer.mng is not manager  # type: ignore[attr-defined]
    assert (manager.pid2config, manager.index2config, manager.module_weight_config_triple) == ({}, {}, [])
    # What another library leaves in it by (group, position) doesn't reach our optimizer.
    manager.index2config[(0, 0)] = {"optim_bits": 32}
    try:
        model = big(target_modules=["q_proj"])
        optimizer = build(model, bnb.optim.AdamW8bit)
        train(model, optimizer, 1)
        assert state_dtypes(model, optimizer)["lora_A"] == {torch.uint8}
    finally:
        manager.initialize()


def test_the_model_of_a_finished_job_is_gone() -> None:
    model = big()
    optimizer = build(model, bnb.optim.AdamW8bit, preset("default"))
    train(model, optimizer, 1)
    watched = [weakref.ref(model), weakref.ref(model.get_submodule("base_model.model.model.embed_tokens"))]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


def test_32_bit_state_survives_saving_and_loading_and_training_goes_on_to_the_same_bits() -> None:
    unbroken, broken = big(), big()
    reference = build(unbroken, bnb.optim.AdamW8bit, preset("default"))
    expected = train(unbroken, reference, 4)
    first = build(broken, bnb.optim.AdamW8bit, preset("default"))
    losses = train(broken, first, 2)
    saved_weights, saved_state = broken.state_dict(), first.state_dict()
    resumed = big()
    resumed.load_state_dict(saved_weights)
    second = build(resumed, bnb.optim.AdamW8bit, preset("default"))
    second.load_state_dict(saved_state)
    assert state_dtypes(resumed, second)["lora_embedding_A"] == {torch.float32}
    losses += train(resumed, second, 2, first=2)
    assert losses == expected
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (OneRate, "takes equal steps in groups with different rates"),
        (FirstRates, "doesn't follow changes of its groups' rates"),
        (OneGroup, "doesn't keep the parameter groups"),
    ],
)
def test_class_that_has_other_rates_than_its_groups_is_refused(
    cls: type[torch.optim.Optimizer], why: str, cli: Callable[..., Finished]
) -> None:
    assert why in ignored_rates(cls, {})
    finished = cli("check", f"optimizer._target_=tests.support.rate_breakers.{cls.__name__}")
    assert finished.status == 1
    assert f"optimizer._target_: {cls.__name__} {why}" in finished.err


def test_class_of_torch_or_bitsandbytes_is_refused_only_if_it_ignores_rates() -> None:
    found = [*vars(torch.optim).values(), *vars(bnb.optim).values()]
    classes = [cls for cls in found if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)]
    assert len(classes) > 40
    assert [cls for cls in classes if ignored_rates(cls, {})] == [torch.optim.Rprop]
