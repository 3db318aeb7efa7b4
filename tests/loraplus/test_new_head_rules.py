"""The rules of a new classification head, in each preset."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from loraplus_hydra.loraplus.grouping import assign
from loraplus_hydra.loraplus.roles import mark_new_head, tensor_records
from loraplus_hydra.loraplus.rules import parse_rules
from tests.loraplus.test_presets import DECAY, LR, B, preset, rates
from tests.support.models import bert, with_lora


def classifier(*, new: bool, **options: Any) -> nn.Module:
    """A BERT classifier with LoRA, whose head is new or trained."""
    base = bert()
    if new:
        mark_new_head(base.classifier)
    return with_lora(base, target_modules=["query"], task_type="SEQ_CLS", **options)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("name", ["default", "roles"])
def test_a_new_head_trains_at_its_own_rate_and_a_trained_head_as_before(name: str, bias: str) -> None:
    before = rates(classifier(new=False, bias=bias), preset(name, lr_head=0.5))
    head = "base_model.model.classifier.modules_to_save.default"
    assert before[f"{head}.weight"] == (LR, DECAY)
    assert before[f"{head}.bias"] == ((B, 0.0) if name == "default" else (LR, 0.0))
    own = {f"{head}.weight": (0.5, DECAY), f"{head}.bias": (0.5, 0.0)}
    model = classifier(new=True, bias=bias)
    assert rates(model, preset(name, lr_head=0.5)) == before | own
    groups = assign(tensor_records(model), preset(name), lr=LR, weight_decay=DECAY).groups
    of_head = {group.name: group.rules for group in groups if group.records[0].name.startswith(head)}
    assert of_head == {"new_head_no_decay": ("head_no_decay",), "new_head": ("head",)}


@pytest.mark.parametrize("name", ["peft", "none", "absolute"])
def test_other_presets_make_no_difference_between_a_new_and_a_trained_head(name: str) -> None:
    assert rates(classifier(new=True), preset(name)) == rates(classifier(new=False), preset(name))


@pytest.mark.parametrize("rule", [{"pattern": "classifier"}, {"new_head": True}, {"role": "saved_module"}])
def test_a_rule_of_your_own_called_head_comes_before_that_of_the_preset(rule: dict[str, Any]) -> None:
    extra = parse_rules({"head": {**rule, "lr": 0.3}})
    groups = assign(
        tensor_records(classifier(new=True)), preset("default"), lr=LR, weight_decay=DECAY, extra=extra
    ).groups
    (weight,) = [group for group in groups for record in group.records if record.role == "saved_module"]
    assert (weight.name, weight.lr) == ("head", 0.3)
