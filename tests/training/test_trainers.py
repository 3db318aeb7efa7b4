"""LoRA+ in front of any Trainer class: the rates of its optimizer are those of the rules, after the first step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraplus_hydra.errors import ConfigErrors, UserError
from tests.support.models import llama, with_lora
from tests.support.tiny import chat_tokenizer, write_jsonl

LR, RATIO = 1e-3, 16


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of prompts with a chosen and a rejected answer."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ("one", "two", "three", "four")
    lines = [
        {"prompt": f"say {words[i % 4]} {i}", "chosen": f" {words[i % 4]}", "rejected": f" {words[(i + 1) % 4]}"}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of prompts with an answer and whether it is a good one: the good ones first."""
    words = ("one", "two", "three", "four")
    lines = [
        {"prompt": f"say {words[i % 4]} {i}", "completion": f" {words[(i + (i >= 12)) % 4]}", "label": i < 12}
        for i in range(24)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "judged.jsonl", lines)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Filled, at each optimizer step of a run, with the rates of lora_A and lora_B as the optimizer has them."""
    from loraplus_hydra.training.hf_trainer import callbacks

    found: dict[str, list[float]] = {"lora_A": [], "lora_B": []}
    original = callbacks.MetricsCallback.on_pre_optimizer_step

    def watched(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in kwargs["optimizer"].param_groups:
            for factor, values in found.items():
                if any(f".{factor}." in name for name in group["param_names"]):
                    values.append(group["lr"])
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.MetricsCallback, "on_pre_optimizer_step", watched)
    return found


RUNS = {
    "SFTTrainer": ["data=jsonl", "data.train={rows}"],
    "Trainer": ["task=text", "data=jsonl", "data.train={rows}", "data.text_column=prompt", "task.block_size=16"],
    "DPOTrainer": ["task=dpo", "data=jsonl", "data.train={pairs}"],
    "ORPOTrainer": ["experiment=orpo", "data=jsonl", "data.train={pairs}"],
    "KTOTrainer": ["experiment=kto", "data.train={judged}"],
}


@pytest.mark.parametrize("trainer", RUNS)
def test_rates_are_those_of_the_rules_at_every_step(
    trainer: str,
    compose: Callable[..., Any],
    tiny_model: Path,
    rows: Path,
    pairs: Path,
    judged: Path,
    rates: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    from loraplus_hydra import run

    overrides = [override.format(rows=rows, pairs=pairs, judged=judged) for override in RUNS[trainer]]
    steps = [
        "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=2",
        "trainer.logging_steps=1",
        "task.samples=0",
    ]
    config = compose(
        "model=hub", f"model.path={tiny_model}", *overrides, *steps, f"optimizer.lr={LR}", f"loraplus.ratio={RATIO}"
    )
    assert config.task._target_.endswith(f".{trainer}")
    result = run(config, tmp_path / "run")
    assert result.status == "ok"
    assert rates["lora_A"] == pytest.approx([LR, LR / 2])
    assert rates["lora_B"] == pytest.approx([LR * RATIO, LR * RATIO / 2])


@pytest.mark.parametrize("trainer", ["DPOTrainer", "KTOTrainer"])
def test_frozen_reference_is_no_part_of_groups_or_adapter(
    trainer: str, compose: Callable[..., Any], tiny_model: Path, pairs: Path, judged: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from loraplus_hydra import run

    overrides = [override.format(pairs=pairs, judged=judged) for override in RUNS[trainer]]
    overrides += ["model=hub", f"model.path={tiny_model}", "trainer.per_device_train_batch_size=2"]
    run(compose(*overrides, "trainer.max_steps=2", "task.samples=1", "task.sample_tokens=2"), tmp_path / "run")
    groups = json.loads((tmp_path / "run" / "param_groups.json").read_text())
    assert groups
    assert not [row for row in groups if ".ref." in row["name"]]
    assert not (tmp_path / "run" / "adapter" / "ref").exists()
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(groups)
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)


def kto_examples(rows: list[dict[str, Any]], compose: Callable[..., Any], tokenizer: Any) -> Any:
    from datasets import Dataset, DatasetDict

    from loraplus_hydra.tasks.kto import examples

    config = compose("experiment=kto", "data.train=unread.jsonl", "model=hub", "model.path=unread")
    made = Dataset.from_list(rows)
    return examples(DatasetDict({"train": made, "eval": made}), tokenizer, config.task, config.data, chat=False)


def test_kto_mixes_good_and_bad_answers_and_shows_good_ones(compose: Callable[..., Any]) -> None:
    """The trainer takes the rows as they come, so a file with the good ones first would make one-sided batches."""
    rows = [{"prompt": "say", "completion": f"answer {i}", "label": i >= 20} for i in range(40)]
    made = kto_examples(rows, compose, chat_tokenizer(None))
    assert sorted(made.train["completion"]) == sorted(row["completion"] for row in rows)
    assert all(row["label"] == (int(row["completion"].split()[1]) >= 20) for row in made.train)
    assert 5 <= sum(made.train["label"][:20]) <= 15
    assert made.references == ("answer 20", "answer 21")


def test_kto_with_batches_of_one_row_is_told_before_anything_is_loaded(
    compose: Callable[..., Any], judged: Path
) -> None:
    from loraplus_hydra.check import check

    overrides = ["model=hub", "model.path=unread", "experiment=kto", f"data.train={judged}"]
    with pytest.raises(ConfigErrors, match="per_device_train_batch_size: KTO combines each prompt"):
        check(compose(*overrides, "trainer.per_device_train_batch_size=1"))


@pytest.mark.parametrize("label", ["maybe", None, 2, "", [True]])
def test_kto_takes_true_and_false_as_labels_alone(label: Any, compose: Callable[..., Any]) -> None:
    good, bad = {"prompt": "say", "completion": "a"}, {"prompt": "say", "completion": "b"}
    with pytest.raises(ConfigErrors, match=r"row 1 of the train rows: 'label' is .*, not true or false"):
        kto_examples([{**good, "label": label}], compose, chat_tokenizer(None))
    for yes, no in ((True, False), (1, 0), ("true", "False"), ("1", "0")):
        made = kto_examples([{**good, "label": yes}, {**bad, "label": no}], compose, chat_tokenizer(None))
        assert {(row["completion"], row["label"]) for row in made.train} == {("a", True), ("b", False)}
        with pytest.raises(ConfigErrors, match="KTO needs good and bad answers"):
            kto_examples([{**good, "label": yes}, {**bad, "label": yes}], compose, chat_tokenizer(None))


def test_mixin_fits_a_trainer_class_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    """A Trainer subclass that knows nothing of this project, made by hand, without any config of ours."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_constant_schedule

    from loraplus_hydra import LoraPlus, LoraPlusMixin
    from loraplus_hydra.loraplus.rules import Rule

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs)

    class OwnWithLoraPlus(LoraPlusMixin, Own):
        pass

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["q_proj"]))
    ids = torch.arange(8).repeat(8, 1)
    trainer: Any = OwnWithLoraPlus(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        loraplus=LoraPlus(
            optimizer_class=torch.optim.AdamW,
            lr=LR,
            rules=[Rule("groupB", role=("lora_B",), ratio=RATIO), Rule("groupA")],
            schedule=get_constant_schedule,
        ),
    )
    trainer.train()
    found = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert found == pytest.approx({"groupA": LR, "groupB": LR * RATIO})


def test_layer_of_the_models_own_that_is_called_like_a_wrapper(tmp_path: Path) -> None:
    """DDP's `module.` is taken off a name, and a layer of that name is not mistaken for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, get_constant_schedule

    from loraplus_hydra import LoraPlus, with_loraplus
    from loraplus_hydra.loraplus.rules import Rule

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.Linear(4, 4)

    model = get_peft_model(Inner(), LoraConfig(target_modules=["module"]))
    settings = LoraPlus(
        optimizer_class=torch.optim.AdamW,
        lr=LR,
        rules=[Rule("groupB", role=("lora_B",), ratio=RATIO), Rule("groupA")],
        schedule=get_constant_schedule,
    )
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer: Any = with_loraplus(Trainer)(model=model, args=arguments, loraplus=settings)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert [tuple(p.shape) for p in groups["groupA"]["params"]] == [(8, 4)]
    assert [tuple(p.shape) for p in groups["groupB"]["params"]] == [(4, 8)]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {"optimizers": (torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), None)},
            {},
            "the Trainer has optimizers",
        ),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2})}, {}, "the Trainer has optimizer_cls_and_kwargs"),
        ({}, {"optim": "adafactor", "adam_beta2": 0.95}, "have optim=adafactor, adam_beta2=0.95"),
        ({}, {"adam_epsilon": 1e-6}, "have adam_epsilon=1e-06"),
        ({}, {"optim": "adamw_torch", "optim_args": "eps=1e-6"}, "have optim_args=eps=1e-6"),
    ],
)
def test_another_optimizer_of_the_trainer_is_refused(
    options: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        own_trainer(tmp_path, options=options, **arguments)
    assert "LoraPlus(optimizer_class=" in str(caught.value)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_trainers_name_of_the_same_optimizer_is_taken(optim: str, tmp_path: Path) -> None:
    assert type(own_trainer(tmp_path, optim=optim).create_optimizer()) is torch.optim.AdamW


def test_an_optimizer_in_deepspeeds_settings_is_refused(tmp_path: Path) -> None:
    trainer = own_trainer(tmp_path)
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}}))
    )
    with pytest.raises(UserError, match="the key optimizer of DeepSpeed's settings"):
        trainer._refuse_other_optimizers()


def moved(trainer: Any) -> set[str]:
    """The names of the tensors that training changes."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_that_is_activated_after_the_trainer_is_made_is_trained(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = with_lora(llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    trainer = own_trainer(tmp_path, model)
    model.set_adapter("second")
    assert moved(trainer) == trained_names(model) != set()
    assert all("v_proj" in name and ".second." in name for name in trained_names(model))
    groups = {group["name"]: (group["initial_lr"], len(group["params"])) for group in trainer.optimizer.param_groups}
    assert groups == {"groupA": (1e-3, 2), "groupB": (2e-3, 2)}


def test_what_is_unfrozen_or_frozen_after_the_trainer_is_made(tmp_path: Path) -> None:
    model = with_lora(llama(), target_modules=["q_proj", "v_proj"])
    trainer = own_trainer(tmp_path, model)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "v_proj" in name:
            parameter.requires_grad_(False)
    assert moved(trainer) == trained_names(model)
    assert "base_model.model.model.norm.weight" in trained_names(model)


def test_lora_fa_keeps_lora_a_of_an_adapter_that_is_activated_later(tmp_path: Path) -> None:
    from peft import LoraConfig

    from loraplus_hydra import LoraPlus
    from loraplus_hydra.loraplus.lora_fa import LoraFA

    model = with_lora(llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    trainer = own_trainer(tmp_path, model, settings=LoraPlus(lr=1e-3, preset="none", optimizer_class=LoraFA))
    model.set_adapter("second")
    assert {name.partition(".v_proj.")[2] for name in moved(trainer)} == {"lora_B.second.weight"}


def test_other_trained_tensors_are_refused_if_the_model_is_sharded(tmp_path: Path) -> None:
    trainer = own_trainer(tmp_path)
    trainer.model.base_model.model.model.norm.weight.requires_grad_(True)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UserError, match=r"other tensors are trained .*: base_model\.model\.model\.norm\.weight"):
        trainer.create_optimizer()


CHANGES: list[Any] = [
    ({"lr": 5e-3}, "groupA: initial_lr 0.001 -> 0.005, groupB: initial_lr 0.002 -> 0.01"),
    ({"ratio": 16}, "groupB: initial_lr 0.002 -> 0.016"),
    ({"weight_decay": 0.1}, "groupA: weight_decay 0.0 -> 0.1"),
    ({"optimizer_arguments": {"betas": (0.5, 0.6)}}, "groupA: betas (0.9, 0.999) -> (0.5, 0.6)"),
    ({"rules": {"groupA": {"role": "lora_A"}, "groupC": {"ratio": 2}}, "ratio": None}, "name groupB -> groupC"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_resume_with_other_rates_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    from loraplus_hydra import LoraPlus

    settings = {"lr": 1e-3, "ratio": 2}
    own_trainer(tmp_path, settings=LoraPlus(**settings), save_steps=2).train()
    other = own_trainer(tmp_path, settings=LoraPlus(**(settings | change)), max_steps=4)
    with pytest.raises(UserError, match=r"has other groups than LoraPlus's settings") as caught:
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert message in str(caught.value)


def test_a_resume_with_the_same_settings_trains_on(tmp_path: Path) -> None:
    """Betas are the same as a list and as a tuple."""
    from loraplus_hydra import LoraPlus

    own_trainer(tmp_path, save_steps=2).train()
    same = LoraPlus(lr=1e-3, ratio=2, optimizer_arguments={"betas": [0.9, 0.999]})
    again = own_trainer(tmp_path, settings=same, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert [group["initial_lr"] for group in again.optimizer.param_groups] == [1e-3, 2e-3]


def own_trainer(folder: Path, model: Any = None, options: Any = None, settings: Any = None, **arguments: Any) -> Any:
    """A plain Trainer with LoRA+, over the same row eight times."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from loraplus_hydra import LoraPlus, with_loraplus

    ids = torch.arange(8).repeat(8, 1)
    return with_loraplus(Trainer)(
        model=with_lora(llama()) if model is None else model,
        args=TrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{"max_steps": 2} | arguments
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        loraplus=settings or LoraPlus(lr=1e-3, ratio=2),
        **(options or {}),
    )
