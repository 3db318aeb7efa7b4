"""LoRA+ at a ratio is plain LoRA with another alpha: bit for bit where the ratio is a power of two."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loraplus_hydra.loraplus.invariance import Plain, decay_per_step, plain_equivalent, rates_of
from loraplus_hydra.loraplus.optimizer import build_optimizer
from loraplus_hydra.loraplus.peft_layers import A_ZERO
from loraplus_hydra.loraplus.settings import LoraPlus

RATIO, LR, ALPHA = 16.0, 2.0**-10, 16
STEPS = 12


def adapted(alpha: float, start: str = "B = 0", **adapter: Any) -> Any:
    """Return a tiny Llama with LoRA. `start` names the factor that is zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(**{"r": 4, "lora_alpha": alpha, "target_modules": "all-linear", **adapter})
    )
    if start == "A = 0":
        model.peft_config["default"].init_lora_weights = A_ZERO
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data.zero_()
            elif "lora_B" in name and parameter.ndim > 1:
                torch.nn.init.normal_(parameter)
    return model


def trained(
    model: Any, settings: LoraPlus, *, clip: float = 0.0, steps: int = STEPS
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on random tokens with a hand-written loop; return the losses and the trained tensors."""
    optimizer = build_optimizer(
        settings.optimizer_class, settings.plan(model).groups, model.named_parameters(), settings.optimizer_arguments
    )
    torch.manual_seed(1)
    batches = torch.randint(0, 64, (steps, 4, 12))
    losses = []
    model.train()
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def eps_rule(factor: float, role: str) -> dict[str, Any]:
    """Return the rule that gives the tensors of a role Adam's eps times `factor`."""
    return {"scaled": {"role": role, "eps": 1e-8 * factor}}


OPTIMIZERS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "Lion": bitsandbytes.optim.Lion,
    "AdamW8bit": bitsandbytes.optim.AdamW8bit,
    "Muon": torch.optim.Muon,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.25},
    "DoRA": {"use_dora": True},
    "rank 128": {"r": 128},  # from 4,096 numbers a tensor on bitsandbytes keeps 8-bit state
}
PAIRS = [("AdamW", adapter) for adapter in ADAPTERS] + [("Lion", "LoRA"), ("AdamW8bit", "rank 128"), ("Muon", "LoRA")]


@pytest.mark.parametrize("start", ["B = 0", "A = 0"])
@pytest.mark.parametrize(("optimizer", "adapter"), PAIRS)
def test_loraplus_is_plain_lora_with_another_alpha_bit_for_bit(start: str, optimizer: str, adapter: str) -> None:
    factor, role = (RATIO, "lora_B") if start == "B = 0" else (1 / RATIO, "lora_A")
    lr = LR if start == "B = 0" else LR * RATIO
    options: dict[str, Any] = {"optimizer_class": OPTIMIZERS[optimizer]}
    # DoRA's magnitude has the rate of a saved module in both runs.
    other = {"magnitude": {"role": "magnitude", "lr": LR}} if adapter == "DoRA" else {}
    losses, tensors = trained(
        adapted(ALPHA, start, **ADAPTERS[adapter]), LoraPlus(lr=LR, ratio=RATIO, extra_rules=other, **options)
    )
    rules = other | ({} if optimizer == "Lion" else eps_rule(factor, role))
    plain_losses, plain_tensors = trained(
        adapted(ALPHA * factor, start, **ADAPTERS[adapter]),
        LoraPlus(lr=lr, preset="none", extra_rules=rules, **options),
    )
    assert plain_losses == losses
    for name, value in tensors.items():
        scaled = plain_tensors[name] * (factor if role in name else 1)
        assert torch.equal(scaled, value), name


def plain(alpha: float, settings: dict[str, Any], **more: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    rules = eps_rule(RATIO, "lora_B") if settings.get("optimizer_class", torch.optim.AdamW) is torch.optim.AdamW else {}
    return trained(adapted(alpha), LoraPlus(lr=LR, preset="none", extra_rules=rules, **settings), **more)


def test_clipping_sets_them_apart_by_little() -> None:
    """The clipped norm is mostly lora_B's, whose gradients are larger by the ratio in plain LoRA."""
    losses, _ = trained(adapted(ALPHA), LoraPlus(lr=LR, ratio=RATIO), clip=1.0, steps=30)
    others, _ = plain(ALPHA * RATIO, {}, clip=1.0, steps=30)
    assert others != losses
    assert others == pytest.approx(losses, rel=0.02)


def test_the_bias_of_lora_B_changes_like_lora_B() -> None:
    settings = {"optimizer_class": bitsandbytes.optim.Lion}
    losses, tensors = trained(adapted(ALPHA, lora_bias=True), LoraPlus(lr=LR, ratio=RATIO, **settings))
    others, plain_tensors = trained(adapted(ALPHA * RATIO, lora_bias=True), LoraPlus(lr=LR, preset="none", **settings))
    assert others == losses
    assert all(torch.equal(plain_tensors[n] * (RATIO if "lora_B" in n else 1), each) for n, each in tensors.items())


def test_sgd_is_not_scale_free() -> None:
    settings = {"optimizer_class": torch.optim.SGD}
    losses, _ = trained(adapted(ALPHA), LoraPlus(lr=LR, ratio=RATIO, **settings))
    assert plain(ALPHA * RATIO, settings)[0] != losses


def equivalent(
    settings: LoraPlus, alpha: float, start: str, optimizer: str = "Lion", clip: float = 0.0, **adapter: Any
) -> Any:
    model = adapted(alpha, start, **adapter)
    return plain_equivalent(settings.plan(model), model.active_peft_config, optimizer, clip)


def test_the_equivalent_is_told_with_what_keeps_it_from_being_exact() -> None:
    settings = LoraPlus(lr=5e-4, ratio=8)
    assert equivalent(settings, 16, "B = 0", "Lion8bit") == Plain(128, 5e-4, ())
    assert equivalent(settings, 16, "A = 0", "Lion") == Plain(2, 4e-3, ())
    assert equivalent(settings, 16, "B = 0", lora_bias=True, target_modules=["q_proj"]) == Plain(128, 5e-4, ())
    (found,) = equivalent(settings, 16, "B = 0", target_modules=["q_proj", "embed_tokens"]).differences
    assert found == "the rate or the scale of lora_embedding_A, lora_embedding_B"
    (found,) = equivalent(settings, 16, "B = 0", alpha_pattern={"q_proj": 8}).differences
    assert found.startswith("adapter.alpha_pattern")
    found = equivalent(settings, 16, "B = 0", "PagedAdamW8bit", 1.0)
    assert found.overrides() == "loraplus=none adapter.lora_alpha=128 optimizer.lr=0.0005"
    assert [text.split()[0].strip(",") for text in found.differences] == ["eps", "clipping"]
    found = equivalent(LoraPlus(lr=5e-4, ratio=8, weight_decay=0.1), 16, "B = 0", "SGD")
    assert [text.split(",")[0] for text in found.differences] == ["SGD", "weight decay"]
    assert equivalent(LoraPlus(lr=5e-4, ratio=1), 16, "B = 0", "SGD", 1.0) == Plain(16, 5e-4, ())


def test_an_equal_run_is_exact_or_says_what_differs() -> None:
    """Each setting is trained as it is and as plain LoRA. The losses are equal only if nothing is said to differ."""
    lion: dict[str, Any] = {"optimizer_class": bitsandbytes.optim.Lion, "lr": LR, "ratio": RATIO}
    bias = {"lora_bias": True, "target_modules": ["q_proj"]}
    b, a = {"B": {"role": "lora_B", "ratio": RATIO}}, {"A": {"role": "lora_A"}}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("B = 0", {}, bias, ""),
        ("B = 0", {"preset": "roles"}, bias, "lora_B_bias"),
        ("A = 0", {}, bias, "lora_B_bias"),
        ("A = 0", {"preset": "roles"}, bias, ""),
        ("B = 0", {"extra_rules": {"B": b["B"] | {"weight_decay": 0.0}}, "weight_decay": 4.0}, {}, "lora_B"),
        ("B = 0", {"extra_rules": {"B": b["B"] | {"betas": [0.5, 0.6]}}}, {}, "lora_B"),
        ("B = 0", {"extra_rules": {"A": a["A"] | {"weight_decay": 4.0}}}, {}, "lora_A"),
    ]
    for start, settings, adapter, differs in cases:
        own = LoraPlus(**(lion | settings))
        found = equivalent(own, ALPHA, start, **adapter)
        assert (differs in " ".join(found.differences)) if differs else found.differences == (), (settings, found)
        losses, _ = trained(adapted(ALPHA, start, **adapter), own)
        decay = settings.get("weight_decay", 0.0)
        like_plain = LoraPlus(preset="none", **(lion | {"lr": found.lr, "ratio": None, "weight_decay": decay}))
        others, _ = trained(adapted(found.alpha, start, **adapter), like_plain)
        assert (others == losses) == (not differs), (start, settings)


def test_radam_is_not_scale_free() -> None:
    settings = {"optimizer_class": torch.optim.RAdam}
    losses, _ = trained(adapted(ALPHA), LoraPlus(lr=LR, ratio=RATIO, **settings))
    others, _ = trained(
        adapted(ALPHA * RATIO), LoraPlus(lr=LR, preset="none", extra_rules=eps_rule(RATIO, "lora_B"), **settings)
    )
    assert others != pytest.approx(losses, rel=1e-4)
    found = equivalent(LoraPlus(lr=LR, ratio=RATIO), ALPHA, "B = 0", "RAdam")
    assert found.differences == ("RAdam, unless its steps don't depend on the gradient's scale",)


def test_a_schedules_smallest_rate_is_named_where_optimizer_lr_changes() -> None:
    settings = LoraPlus(lr=5e-4, ratio=8)
    model = adapted(16, "A = 0")
    found = plain_equivalent(settings.plan(model), model.active_peft_config, "Lion", 0.0, ["scheduler.min_lr"])
    assert found is not None
    assert found.differences == ("scheduler.min_lr, which would have to be 8 times as large",)
    model = adapted(16)
    found = plain_equivalent(settings.plan(model), model.active_peft_config, "Lion", 0.0, ["scheduler.min_lr"])
    assert found is not None
    assert found.differences == ()


def test_rates_start_and_decay_are_those_of_the_plan() -> None:
    model = adapted(16)
    plan = LoraPlus(lr=5e-4, ratio=8, weight_decay=0.1).plan(model)
    rates = rates_of(plan, model.active_peft_config)
    assert rates is not None
    assert (rates.alpha_eta_b, rates.ratio, rates.width) == (pytest.approx(0.064), pytest.approx(8), 32)
    weights = torch.nn.Linear(32, 4096, bias=False).weight  # as PEFT starts lora_A
    assert rates.steps_of_a == pytest.approx(weights.std().item() / 5e-4, rel=0.01)
    assert decay_per_step(plan) == pytest.approx({"groupA": 5e-5, "groupB": 4e-4})
    rank_stable = adapted(16, r=64, use_rslora=True)  # its scale is 16 / 8, that of a usual LoRA with alpha 128
    rates = rates_of(LoraPlus(lr=5e-4, ratio=8).plan(rank_stable), rank_stable.active_peft_config)
    assert rates is not None
    assert rates.alpha_eta_b == pytest.approx(128 * 8 * 5e-4)
    several = LoraPlus(lr=5e-4, extra_rules={"q": {"pattern": "q_proj", "lr": 1.0}})
    assert rates_of(several.plan(model), model.active_peft_config) is None


def test_another_start_of_lora_A_has_no_number_of_steps() -> None:
    model = adapted(16, init_lora_weights="gaussian")
    rates = rates_of(LoraPlus(lr=5e-4).plan(model), model.active_peft_config)
    assert rates is not None
    assert (rates.init, rates.steps_of_a) == ("Init[1]", None)
