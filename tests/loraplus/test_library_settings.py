"""`LoraPlus(lr, ratio)`, presets as rules, and schedules by name, without Hydra."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from loraplus_hydra import LoraPlus, create_loraplus_optimizer, group_parameters, preset_rules, with_loraplus
from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.rules import Rule
from loraplus_hydra.loraplus.schedule import named_schedule, one_cycle
from tests.support.models import llama, with_lora
from tests.support.presets import CONF, LR, preset

PRESETS = sorted(path.stem for path in (CONF / "loraplus").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_rules_are_those_that_omegaconf_composes(name: str) -> None:
    assert preset_rules(name, lr=LR) == preset(name)


def test_keys_of_a_preset_reach_its_rules() -> None:
    assert preset_rules("default", ratio=2, lr_embedding=1e-5) == preset("default", ratio=2.0, lr_embedding=1e-5)
    assert preset_rules("absolute", lr_A=1e-5, lr_B=3e-4) == preset("absolute", lr_A=1e-5, lr_B=3e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "defautl"}, "there is no preset 'defautl' (did you mean 'default'?)"),
        ({"ration": 8}, "preset 'default' has no key 'ration' (did you mean 'ratio'?)"),
        ({"name": "none", "ratio": 8}, "preset 'none' has no key 'ratio'"),
        ({"ratio": 0}, "ratio must be finite and above 0"),
        ({"name": "absolute"}, "preset 'absolute' needs the optimizer's rate"),
    ],
)
def test_wrong_presets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        preset_rules(**arguments)
    assert message in str(caught.value)


def rates(groups: Any) -> dict[str, float]:
    return {group.name: group.lr for group in groups}


def test_lr_and_ratio_are_enough() -> None:
    assert rates(LoraPlus(lr=1e-4, ratio=4).plan(with_lora(llama())).groups) == {"groupA": 1e-4, "groupB": 4e-4}
    assert rates(LoraPlus(lr=1e-4).plan(with_lora(llama())).groups) == pytest.approx({"groupA": 1e-4, "groupB": 8e-4})


def test_rules_are_taken_as_a_mapping_everywhere() -> None:
    mapping = {"groupB": {"role": "lora_B", "ratio": 3}, "groupA": {}}
    rules = [Rule("groupB", role=("lora_B",), ratio=3.0), Rule("groupA")]
    first = {"first": {"pattern": r"layers\.0\.", "lr": 5e-4}}
    model = with_lora(llama())
    settings = LoraPlus(lr=1e-3, rules=mapping, extra_rules=first)
    assert settings.plan(model).groups == LoraPlus(lr=1e-3, rules=rules, extra_rules=first).plan(model).groups
    assert rates(settings.plan(model).groups) == {"groupA": 1e-3, "groupB": 3e-3, "first": 5e-4}
    groups = group_parameters(model, mapping, lr=1e-3, extra_rules=first)
    assert {group["name"]: group["lr"] for group in groups} == {"groupA": 1e-3, "groupB": 3e-3, "first": 5e-4}


def test_replaced_settings_make_other_rules() -> None:
    """By hand: preset `none` has one rate, and `default` has the ratio 8."""
    model, first = with_lora(llama()), {"first": {"pattern": r"layers\.0\.", "lr": 5e-4}}
    settings = LoraPlus(lr=1e-4, extra_rules=first)
    assert set(rates(replace(settings, preset="none", extra_rules=()).plan(model).groups).values()) == {1e-4}
    changed = rates(replace(settings, lr=1e-3, ratio=2).plan(model).groups)
    assert changed == pytest.approx({"groupA": 1e-3, "groupB": 2e-3, "first": 5e-4})
    own = LoraPlus(lr=1e-4, rules={"all": {}})
    assert rates(replace(own, rules=None).plan(model).groups) == pytest.approx({"groupA": 1e-4, "groupB": 8e-4})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "rolse"}, "did you mean 'roles'?"),
        ({"schedule": "cosin"}, "there is no schedule 'cosin' (did you mean 'cosine'?)"),
        ({"ratio": 4, "rules": {"all": {}}}, "`ratio` is only for a preset"),
        ({"extra_rules": {"head": {"role": "lora_C"}}}, "there is no role 'lora_C'"),
        ({"optimizer_arguments": {"weight_decay": 0.1}}, "set LoraPlus(weight_decay=0.1)"),
        ({"optimizer_arguments": {"lr": 5e-2}}, "set LoraPlus(lr=0.05)"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        LoraPlus(lr=1e-4, **arguments)
    assert message in str(caught.value)


def test_schedules_by_name() -> None:
    assert named_schedule("cosine") is get_cosine_schedule_with_warmup
    assert named_schedule("one_cycle") is one_cycle
    assert LoraPlus(lr=1e-4, schedule="cosine").schedule is get_cosine_schedule_with_warmup


def test_without_a_schedule_the_trainers_own_arguments_decide(tmp_path: Path) -> None:
    """Against transformers' own scheduler over one group, at each step."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", lr_scheduler_type="cosine", warmup_steps=3
    )
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    trainer = with_loraplus(Trainer)(model=model, args=arguments, loraplus=LoraPlus(lr=1e-3, ratio=4))
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factors = get_cosine_schedule_with_warmup(plain, num_warmup_steps=3, num_training_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the order of steps
        for _ in range(10):
            factor = factors.get_last_lr()[0]
            assert trainer.lr_scheduler.get_last_lr() == pytest.approx([1e-3 * factor, 4e-3 * factor])
            factors.step()
            trainer.lr_scheduler.step()


def test_absolute_smallest_rate_refers_to_lr_whatever_group_is_first(tmp_path: Path) -> None:
    """By hand: a cosine to min_lr = lr / 10 ends each group at a tenth of its own rate."""
    settings = LoraPlus(
        lr=1e-4,
        rules={"a": {"role": "lora_A", "lr_mult": 0.1}, "b": {"ratio": 8}},
        schedule="cosine_with_min_lr",
        schedule_arguments={"num_warmup_steps": 0, "min_lr": 1e-5},
    )
    trainer = with_loraplus(Trainer)(
        model=get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        loraplus=settings,
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    assert trainer.optimizer.defaults["lr"] == 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the order of steps
        for _ in range(4):
            trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([1e-6, 8e-5])


class _MakesBatches(Trainer):
    """A Trainer that gets a list of rows and makes the tensors itself, as TRL's GRPOTrainer does."""

    factor = 1.0

    def _prepare_inputs(self, inputs: Any) -> Any:
        ids = torch.tensor([row["input_ids"] for row in inputs])
        return {"input_ids": ids, "labels": ids}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.factor

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


def test_a_trainer_that_makes_its_batches_from_lists_of_rows_is_evaluated(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3 + i]} for i in range(4)]

    def made(**options: Any) -> Any:
        names = ("per_device_train_batch_size", "per_device_eval_batch_size")
        own: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
        arguments = TrainingArguments(output_dir=str(tmp_path), **own, **dict.fromkeys(names, 2))
        parts: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows, "data_collator": list, **options}
        return (with_loraplus(_MakesBatches) if options else _MakesBatches)(with_lora(llama()), arguments, **parts)

    plain, ours = made(), made(loraplus=LoraPlus(lr=1e-3))
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    ours.train()
    ours.factor = float("nan")
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        ours.train()


def test_a_model_without_an_adapter_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the model has no adapter"):
        create_loraplus_optimizer(llama(), torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=8)


def test_importing_prints_nothing() -> None:
    code = "from loraplus_hydra import *\nfrom loraplus_hydra import LoraPlusMixin\nimport peft.tuners.lora.bnb"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
