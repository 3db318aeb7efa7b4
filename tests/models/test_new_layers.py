"""The layers of a classifier's head that begin untrained, beside those that transformers finds no weights for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, DistilBertConfig

from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.models.base_model import meta_model
from loraplus_hydra.models.properties import mark_new_layers
from loraplus_hydra.training.prepare import add_meta_adapter
from tests.models.test_model import SEQ_CLS, model_group
from tests.support.architectures import ARCHITECTURES, VOCABULARY, config_of

HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "gpt2": ["score"],
    "llama": ["score"],
    "distilbert": ["pre_classifier", "classifier"],
}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 2}


def sizes(architecture: str, **changes: Any) -> Any:
    if architecture in ARCHITECTURES:
        return config_of(architecture, **changes)
    return DistilBertConfig(**DISTILBERT, **changes)


def config_for(folder: Path, *, new_head: bool = False, **adapter: Any) -> Any:
    return OmegaConf.create(
        {
            "model": model_group(folder),
            "task": {"auto_class": SEQ_CLS, "task_type": "SEQ_CLS", "new_head": new_head},
            "adapter": {"_target_": "peft.LoraConfig", "target_modules": "all-linear", **adapter},
        }
    )


def new_tensors(config: Any, outputs: int) -> set[str]:
    """Names, in the base model, of the tensors that count as a new head's. No weights are loaded."""
    model = meta_model(config.model, SEQ_CLS, {"num_labels": outputs})
    records = tensor_records(add_meta_adapter(model, config))
    names = (record.name.removeprefix("base_model.model.") for record in records if record.new_head)
    return {name.replace(".modules_to_save.default.", ".") for name in names}


@pytest.mark.parametrize("outputs", [3, 5])
@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("architecture", HEADS)
def test_new_layers_are_those_for_which_transformers_finds_no_weights(
    architecture: str, has_head: bool, outputs: int, tmp_path: Path
) -> None:
    auto = AutoModelForSequenceClassification if has_head else AutoModel
    auto.from_config(sizes(architecture, **({"num_labels": 3} if has_head else {}))).save_pretrained(tmp_path)
    _, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=outputs, ignore_mismatched_sizes=True, output_loading_info=True
    )
    missing = set(loading["missing_keys"]) | {name for name, *_ in loading["mismatched_keys"]}
    assert bool(missing) is not (has_head and outputs == 3)
    assert new_tensors(config_for(tmp_path, modules_to_save=HEADS[architecture]), outputs) == missing


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_a_head_that_the_task_replaces_is_new(architecture: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(sizes(architecture, num_labels=3))
    model.save_pretrained(tmp_path)
    head = {name for name, _ in model.named_parameters() if name.startswith(HEADS[architecture][0])}
    assert head
    assert new_tensors(config_for(tmp_path, new_head=True), 3) == head


def test_dora_on_a_new_head_has_its_own_roles(tmp_path: Path) -> None:
    AutoModel.from_config(sizes("bert")).save_pretrained(tmp_path)
    config = config_for(tmp_path, use_dora=True)
    config.adapter.target_modules = ["query", "classifier"]
    config.task.task_type = None  # with it, PEFT trains the head itself
    model = add_meta_adapter(meta_model(config.model, SEQ_CLS), config)
    head = [record for record in tensor_records(model) if ".classifier." in record.name]
    assert {record.role for record in head} == {"lora_A", "lora_B", "magnitude"}
    assert not any(record.new_head for record in head)


def test_a_model_that_classifies_nothing_has_no_new_head(tmp_path: Path) -> None:
    auto = "transformers.AutoModelForCausalLM"
    AutoModel.from_config(AutoConfig.for_model("llama", **ARCHITECTURES["llama"])).save_pretrained(tmp_path)
    config = config_for(tmp_path, modules_to_save=["lm_head"])
    config.task.auto_class, config.task.task_type = auto, "CAUSAL_LM"
    model = meta_model(config.model, auto)
    mark_new_layers(model, config)
    assert not any(record.new_head for record in tensor_records(add_meta_adapter(model, config)))
