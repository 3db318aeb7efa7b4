"""Optimizers made for LoRA: each is its own package's, with groups that keep their rates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments

from loraplus_hydra import create_loraplus_optimizer
from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.factor_pairs import PairedOptimizer, factor_pairs
from loraplus_hydra.loraplus.lora_fa import LoraFA
from loraplus_hydra.loraplus.memory import measure_state
from loraplus_hydra.loraplus.optimizer import build_optimizer
from loraplus_hydra.loraplus.optimizer_check import optimizer_problems
from loraplus_hydra.loraplus.riemannian import RiemannianAdamW
from loraplus_hydra.loraplus.schedule_free import RUNNING_VALUES, TRAINED_WEIGHTS
from loraplus_hydra.loraplus.settings import LoraPlus
from loraplus_hydra.training.hf_trainer.loraplus_mixin import with_loraplus
from tests.support.models import ConvNet, gpt2, llama, with_lora
from tests.support.presets import LR

RATIO, HEAD, STEPS = 8.0, 3e-4, 3
HEAD_RULE = {"head": {"role": "saved_module", "lr": HEAD}}


def adapted(**config: Any) -> nn.Module:
    """Return a tiny Llama with LoRA of two ranks and scalings, and a trained head."""
    config = {"lora_alpha": 6, "rank_pattern": {"v_proj": 4}, "modules_to_save": ["lm_head"], **config}
    return with_lora(llama(), **config)


def batches(steps: int = STEPS) -> list[torch.Tensor]:
    return list(torch.randint(0, 64, (steps, 4, 12), generator=torch.Generator().manual_seed(3)))


def trained(model: nn.Module, optimizer: Any, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Train with a hand-written loop; return the adapter's tensors and the head."""
    for batch in batches(steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    parts = (".lora_A.", ".lora_B.", ".lora_embedding_", ".modules_to_save.")
    return {name: each.detach().clone() for name, each in model.named_parameters() if any(p in name for p in parts)}


def ours(model: nn.Module, cls: type[Any], **arguments: Any) -> tuple[LoraPlus, Any]:
    """Return the settings, and the optimizer that a run builds."""
    rules = {"extra_rules": HEAD_RULE} if any("modules_to_save" in name for name, _ in model.named_parameters()) else {}
    settings = LoraPlus(lr=LR, ratio=RATIO, optimizer_class=cls, optimizer_arguments=arguments, **rules)
    plan, pairs = settings.plan(model), factor_pairs(model) if issubclass(cls, PairedOptimizer) else None
    built = build_optimizer(cls, plan.groups, model.named_parameters(), {"lr": LR, **arguments}, pairs=pairs)
    return settings, built


def regrouped(optimizer: Any, model: nn.Module) -> Any:
    """Give a package's optimizer of one group the rates of the table: A, B and the head, each in a group."""
    (group,) = optimizer.param_groups
    optimizer.param_groups = []
    for part, lr in (("lora_A", LR), ("lora_B", LR * RATIO), ("modules_to_save", HEAD)):
        own = [parameter for name, parameter in model.named_parameters() if part in name and parameter.requires_grad]
        optimizer.add_param_group({**group, "params": own, "lr": lr})
    return optimizer


# LoRA-FA


def test_lora_fa_takes_pefts_steps() -> None:
    """PEFT's function has one rate, so the head trains at lora_B's here."""
    reference = adapted()
    expected = trained(reference, create_lorafa_optimizer(reference, r=8, lora_alpha=6, lr=LR * RATIO))
    model = adapted()
    _, optimizer = ours(model, LoraFA)
    for group in optimizer.param_groups:
        group["lr"] = LR * RATIO
    start, found = weights(model), trained(model, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [name for name in start if torch.equal(start[name], found[name])] == [n for n in start if "lora_A" in n]


def test_lora_fa_has_the_tables_rates_and_no_group_of_lora_a() -> None:
    model = adapted()
    settings, optimizer = ours(model, LoraFA, eps=1e-12)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"groupB": LR * RATIO, "head": HEAD}
    assert {group.name: group.lr for group in settings.plan(model).groups} == rates
    assert not any("lora_A" in name for group in optimizer.param_groups for name in group["param_names"])
    # Each group moves by its own rate: Adam's first step of an element is its rate
    before = weights(model)
    after = trained(model, optimizer, steps=1)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert all(value == pytest.approx(LR * RATIO, rel=0.01) for name, value in moved.items() if "lora_B" in name)
    assert moved["base_model.model.lm_head.modules_to_save.default.weight"] == pytest.approx(HEAD, rel=0.01)


@pytest.mark.parametrize("cls", [LoraFA, RiemannianAdamW])
def test_state_is_kept_for_each_tensor_and_continues(cls: type[Any]) -> None:
    model = adapted()
    settings, optimizer = ours(model, cls)
    measured = measure_state(settings.plan(model), settings)
    trained(model, optimizer, steps=2)
    stored, kept = copy.deepcopy(optimizer.state_dict()), weights(model)
    rest = trained(model, optimizer)
    own = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert {id(key) for key in optimizer.state} == own
    sizes = {tensor.record.name: tensor.state.bytes for tensor in measured.tensors if tensor.state is not None}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            tensors = [each for each in optimizer.state[parameter].values() if isinstance(each, torch.Tensor)]
            assert sizes[name] == sum(each.numel() * each.element_size() for each in tensors)
    again = adapted()
    _, resumed = ours(again, cls)
    for name, parameter in again.named_parameters():
        if name in kept:
            parameter.data.copy_(kept[name])
    resumed.load_state_dict(stored)
    found = trained(again, resumed)
    assert all(torch.equal(found[name], rest[name]) for name in rest)


def conv() -> nn.Module:
    return with_lora(ConvNet(), target_modules=["conv2d", "head"])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: adapted(use_dora=True), "without DoRA.*lora_magnitude_vector"),
        (lambda: with_lora(llama(), target_modules=["q_proj", "embed_tokens"]), "lora_embedding_A"),
        (conv, "convolutions.*conv2d"),
        (lambda: with_lora(llama(), target_modules=["embed_tokens"]), "needs LoRA on linear layers"),
        (llama, "needs LoRA on linear layers"),
    ],
)
def test_lora_fa_refuses_what_its_formula_does_not_cover(model: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        LoraPlus(lr=LR, optimizer_class=LoraFA).plan(model())


def test_lora_fa_refuses_a_lora_a_of_zero() -> None:
    model = adapted()
    for pair in factor_pairs(model):
        pair.a.data.zero_()
    with pytest.raises(UserError, match="doesn't train lora_A, which starts at zero"):
        LoraPlus(lr=LR, optimizer_class=LoraFA).plan(model)


def test_a_layers_name_does_not_matter() -> None:
    """PEFT's step takes every name with `lora` for a factor; here the names are not the model's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lora_block, self.explorative = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.explorative(self.lora_block(x))

    model = with_lora(Block(), target_modules=["lora_block"], modules_to_save=["explorative"])
    _, optimizer = ours(model, LoraFA)
    start = weights(model)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert {name for name, each in weights(model).items() if torch.equal(each, start[name])} == {
        name for name in start if "lora_A" in name
    }


# Riemannian preconditioning


@pytest.mark.parametrize("model", [adapted, lambda: with_lora(gpt2(), target_modules=["c_attn", "wte"])])
def test_riemannian_adamw_takes_pefts_steps_at_the_tables_rates(model: Callable[[], nn.Module]) -> None:
    reference, tuned = model(), {"reg": 0.02, "weight_decay": 0.0}
    theirs = create_riemannian_optimizer(reference, torch.optim.AdamW, lr=LR, **tuned)
    embedding = [each for name, each in reference.named_parameters() if "lora_embedding" in name]
    theirs = regrouped(theirs, reference)
    if embedding:
        theirs.add_param_group({**theirs.defaults, "params": embedding, "lr": 1e-6})
    expected, mine = trained(reference, theirs), model()
    _, optimizer = ours(mine, RiemannianAdamW, reg=0.02)
    assert {group["lr"] for group in optimizer.param_groups} >= {LR, LR * RATIO}
    found = trained(mine, optimizer)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-9) for name in expected)


def scaled_run(base: type[Any], scale: float, lr: float, preconditioned: bool = True) -> torch.Tensor:
    """Return the change of one layer's B A after training with A times `scale` and B divided by it at the start."""
    model = with_lora(llama(), target_modules=["q_proj"]).double()
    generator = torch.Generator().manual_seed(5)
    for pair in factor_pairs(model):
        pair.b.data.copy_(torch.randn(pair.b.shape, generator=generator) / scale)
        pair.a.data.mul_(scale)
    arguments = {} if base is torch.optim.SGD else {"weight_decay": 0.0, "eps": 1e-16}
    if preconditioned:
        optimizer = create_riemannian_optimizer(model, base, lr=lr, reg=1e-13, **arguments)
    else:
        optimizer = base([each for each in model.parameters() if each.requires_grad], lr=lr, **arguments)
    first = factor_pairs(model)[0]
    start = (first.b @ first.a).detach().clone()
    trained(model, optimizer)
    return (first.b @ first.a).detach() - start


def test_the_ratios_meaning_is_the_one_that_is_told() -> None:
    """PEFT's preconditioner alone makes the scale between A and B meaningless; AdamW after it brings it back."""
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    assert torch.allclose(scaled_run(sgd, 1.0, 0.1), scaled_run(sgd, 4.0, 0.1), rtol=1e-6, atol=1e-12)
    plain = scaled_run(sgd, 4.0, 0.1, preconditioned=False) / scaled_run(sgd, 1.0, 0.1, preconditioned=False)
    assert (plain - 1).abs().median() > 0.5
    changed = scaled_run(adamw, 4.0, 1e-3) / scaled_run(adamw, 1.0, 1e-3)
    assert (changed - 1).abs().median() > 0.5


def test_riemannian_needs_pairs_and_one_reg() -> None:
    with pytest.raises(UserError, match="RiemannianAdamW needs LoRA on linear layers"):
        LoraPlus(lr=LR, optimizer_class=RiemannianAdamW).plan(with_lora(llama(), target_modules=["embed_tokens"]))
    for reg in (0.0, -1.0):
        with pytest.raises(UserError, match="reg must be above 0"):
            ours(adapted(), RiemannianAdamW, reg=reg)
    model, rules = adapted(), {"values": {"pattern": "v_proj", "reg": 0.5}}
    groups = LoraPlus(lr=LR, optimizer_class=RiemannianAdamW, extra_rules=rules).plan(model).groups
    with pytest.raises(UserError, match="one number for all groups"):
        build_optimizer(RiemannianAdamW, groups, model.named_parameters(), {"lr": LR})


@pytest.mark.parametrize("cls", [LoraFA, RiemannianAdamW])
def test_the_drop_in_gives_the_pairs_and_a_hand_made_optimizer_says_what_it_lacks(cls: type[Any]) -> None:
    model = with_lora(llama())
    optimizer = create_loraplus_optimizer(model, cls, lr=LR, loraplus_lr_ratio=RATIO)
    assert len(optimizer.pairs) == len(factor_pairs(model))  # type: ignore[attr-defined]
    trained(model, optimizer, steps=1)
    alone = cls([each for each in model.parameters() if each.requires_grad])
    with pytest.raises(UserError, match="needs the pairs"):
        alone.step()


# schedule-free


@pytest.mark.extras
def test_schedule_free_takes_the_packages_steps_and_evaluates_its_averages() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    from loraplus_hydra.loraplus.schedule_free_adamw import AdamWScheduleFree

    reference, tuned = adapted(), {"warmup_steps": 2, "betas": (0.8, 0.99)}
    theirs = schedulefree.AdamWScheduleFree([each for each in reference.parameters() if each.requires_grad], **tuned)
    theirs = regrouped(theirs, reference)
    theirs.train()
    expected = trained(reference, theirs)
    model = adapted()
    _, optimizer = ours(model, AdamWScheduleFree, **tuned)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR * RATIO, HEAD]
    assert all(torch.equal(each, expected[name]) for name, each in trained(model, optimizer).items())
    theirs.eval()
    optimizer.eval()
    averaged = weights(reference)
    assert all(torch.equal(each, averaged[name]) for name, each in weights(model).items())
    assert not any(torch.equal(each, expected[name]) for name, each in averaged.items())
    optimizer.train()  # exactly back, which the package's own switch isn't
    assert all(torch.equal(each, expected[name]) for name, each in weights(model).items())
    assert not any(TRAINED_WEIGHTS in state for state in optimizer.state.values())
    assert set(theirs.defaults) - set(RUNNING_VALUES) == {
        *("lr", "betas", "eps", "r", "warmup_steps", "weight_lr_power", "weight_decay", "foreach")
    }


@pytest.mark.extras
def test_a_trainer_evaluates_and_ends_with_the_averages(tmp_path: Any) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    from loraplus_hydra.loraplus.schedule_free_adamw import AdamWScheduleFree

    rows = [{"input_ids": row, "labels": row} for row in batches(1)[0]]
    model = adapted()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    settings = LoraPlus(lr=LR, ratio=RATIO, optimizer_class=AdamWScheduleFree, extra_rules=HEAD_RULE)
    trainer = with_loraplus(Trainer)(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, loraplus=settings
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    reference = adapted()
    theirs = regrouped(
        schedulefree.AdamWScheduleFree([each for each in reference.parameters() if each.requires_grad]), reference
    )
    batch, expected = batches(1)[0], []
    for step in range(4):
        theirs.train()
        reference.train()
        reference(input_ids=batch, labels=batch).loss.backward()
        theirs.step()
        theirs.zero_grad()
        if step % 2:
            theirs.eval()
            reference.eval()
            with torch.no_grad():
                expected.append(float(reference(input_ids=batch, labels=batch).loss))
    assert losses == pytest.approx(expected, rel=1e-5)
    averaged = weights(reference)
    assert all(torch.allclose(each, averaged[name], atol=1e-6) for name, each in weights(model).items())


def test_the_packages_own_classes_are_refused_with_what_to_use() -> None:
    from peft.optimizers.lorafa import LoraFAOptimizer

    assert "use optimizer=lora_fa" in "\n".join(optimizer_problems(LoraFAOptimizer, {}))
    theirs = type("AdamWScheduleFree", (torch.optim.AdamW,), {"__module__": "schedulefree.adamw_schedulefree"})
    assert "use optimizer=schedulefree_adamw" in "\n".join(optimizer_problems(theirs, {}))


def test_check_says_at_the_optimizer_what_it_cannot_train(cli: Callable[..., Any]) -> None:
    for chosen, told in (
        (["optimizer=lora_fa", "adapter=dora"], "- optimizer: LoraFA can only train plain LoRA"),
        (["optimizer=lora_fa", "adapter=lora_a_zero"], "- optimizer: LoraFA doesn't train lora_A"),
        (["optimizer=riemannian_adamw", "optimizer.reg=0"], "reg must be above 0"),
        (["optimizer=riemannian_adamw", "optimizer.lr=auto"], "published rates are those of Adam"),
        (["optimizer=riemannian_adamw", "+trainer.fsdp=full_shard"], "RiemannianAdamW needs whole tensors"),
    ):
        ended = cli("check", *chosen)
        assert (ended.status, told in ended.err) == (1, True), ended.err


def test_inspect_says_what_the_ratio_means(cli: Callable[..., Any]) -> None:
    shown = cli("inspect", "optimizer=lora_fa", "loraplus.ratio=0.5").out
    assert "only lora_B's rate counts, which is 0.00025" in " ".join(shown.split())
    assert "lora_A |" not in shown
    assert "LoRA+ needs a larger one" not in shown
    shown = cli("inspect", "optimizer=riemannian_adamw", "loraplus.ratio=4").out
    assert "the ratio means what it does with AdamW" in shown
    assert "reg, which would have to be 0.0625 times as large for lora_A" in shown


@pytest.mark.extras
def test_a_falling_rate_is_refused_for_a_schedule_free_optimizer(cli: Callable[..., Any]) -> None:
    pytest.importorskip("schedulefree")
    chosen = ["check", "optimizer=schedulefree_adamw"]
    for schedule in ("linear", "cosine", "one_cycle", "wsd"):
        ended = cli(*chosen, f"scheduler={schedule}")
        assert (ended.status, "the schedule must not fall" in ended.err) == (1, True), ended.err
    for schedule in ("constant", "constant_with_warmup"):
        assert cli(*chosen, f"scheduler={schedule}").status == 0
