"""Names in the adapter group that fit nothing are errors, as PEFT matches them; shared layers are planned as such."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.training.prepare import plan_on_meta
from tests.support.architectures import checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("adapter.target_modules=[q_proj,v_porj]", "'v_porj' fits no layer of this model (did you mean 'v_proj'?)"),
        ("adapter.target_modules=[q_proj,self_attn.v_porj]", "(did you mean 'self_attn.v_proj'?)"),
        ("+adapter.modules_to_save=[lm_hed]", "'lm_hed' fits no layer of this model (did you mean 'lm_head'?)"),
        ("+adapter.rank_pattern={q_porj: 2}", "'q_porj' fits no adapted layer (did you mean 'q_proj'?)"),
        ("+adapter.rank_pattern={lm_head: 2}", "'lm_head' fits no adapted layer"),
        ("+adapter.alpha_pattern={q_porj: 2}", "'q_porj' fits no adapted layer (did you mean 'q_proj'?)"),
        ("+adapter.exclude_modules=[q_porj]", "'q_porj' fits no layer of this model (did you mean 'q_proj'?)"),
        ("+adapter.exclude_modules='.*q_porj'", "'.*q_porj' fits no layer of this model"),
        ("+adapter.target_parameters=[mlp.experts.gate]", "'mlp.experts.gate' fits no parameter of this model"),
        ("+adapter.layers_to_transform=[0,99]", "no adapted layer has the number 99"),
    ],
)
def test_what_fits_nothing_is_an_error_at_its_key(
    override: str, told: str, llama: Path, compose: Callable[..., DictConfig]
) -> None:
    targets = ["adapter.target_modules=[q_proj,v_proj]"] if "layers_to" in override else []
    config = compose("model=hub", f"model.path={llama}", *targets, override)
    with pytest.raises(ConfigErrors) as error:
        plan_on_meta(config)
    (problem,) = error.value.problems
    assert problem.key == override.partition("=")[0].removeprefix("+")
    assert told in str(problem)


def test_each_wrong_name_is_told(llama: Path, compose: Callable[..., DictConfig]) -> None:
    wrong = ["adapter.target_modules=[q_proj,a,b]", "+adapter.alpha_pattern={c: 1}"]
    with pytest.raises(ConfigErrors) as error:
        plan_on_meta(compose("model=hub", f"model.path={llama}", *wrong))
    keys = [problem.key for problem in error.value.problems]
    assert keys == ["adapter.target_modules", "adapter.target_modules", "adapter.alpha_pattern"]


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["adapter.target_modules=[self_attn.q_proj,layers.1.mlp.up_proj]"], 3),
        (["+adapter.exclude_modules=[k_proj,lm_head]"], 12),
        (["+adapter.exclude_modules='.*[kq]_proj'"], 10),
        (["adapter.target_modules=all-linear+embeddings", "+adapter.exclude_modules=[k_proj]"], 13),
        (["+adapter.rank_pattern={q_proj: 2, .*1.self_attn.v_proj: 1}"], 14),
        (["adapter.target_modules=[q_proj]", "+adapter.layers_to_transform=[1]"], 1),
        (["adapter.target_modules=[q_proj]", "+adapter.layers_to_transform=0"], 1),
        (["adapter.target_modules=[q_proj]", "+adapter.target_parameters=[v_proj.weight]"], 4),
        (
            [
                *("adapter.target_modules=[q_proj]", "+adapter.layer_replication=[[0,2],[1,2]]"),
                *("+adapter.layers_to_transform=[2]", "+adapter.alpha_pattern={layers.2.self_attn.q_proj: 1}"),
            ],
            1,
        ),
    ],
)
def test_what_peft_matches_is_accepted(
    overrides: list[str], layers: int, llama: Path, compose: Callable[..., DictConfig]
) -> None:
    """The counts are by hand: two layers with seven linear layers each, and an embedding."""
    _, plan = plan_on_meta(compose("model=hub", f"model.path={llama}", *overrides))
    firsts = [record for record in plan.records if record.role in ("lora_A", "lora_embedding_A")]
    assert len(firsts) == layers


@pytest.mark.parametrize(
    ("overrides", "arguments"),
    [
        (
            ["+adapter.modules_to_save=[embed_tokens]", "+adapter.ensure_weight_tying=true"],
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
        (["+adapter.layer_replication=[[0,2],[1,2]]"], {"layer_replication": [(0, 2), (1, 2)]}),
        (["adapter.init_lora_weights=pissa"], {}),
        (
            [
                *("+adapter.modules_to_save=[embed_tokens]", "+adapter.ensure_weight_tying=true"),
                *("adapter.init_lora_weights=pissa", "adapter.r=64"),
            ],
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "init_lora_weights": "pissa", "r": 64},
        ),
    ],
)
def test_plan_has_the_tensors_of_pefts_own_model(
    overrides: list[str], arguments: dict[str, Any], tmp_path: Path, compose: Callable[..., DictConfig]
) -> None:
    """PEFT shares some parameters between modules; a tied embedding that is saved is one trained tensor."""
    path = checkpoint("qwen2", tmp_path)
    model, plan = plan_on_meta(
        compose("model=hub", f"model.path={path}", "adapter.target_modules=[q_proj]", *overrides)
    )
    base: Any = AutoModelForCausalLM.from_pretrained(path)
    real = get_peft_model(base, LoraConfig(**{"r": 8, "target_modules": ["q_proj"], **arguments}))
    assert {record.name: record.shape for record in plan.records} == _shapes(real, trained=True)
    assert _shapes(model) == _shapes(real)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def _shapes(model: nn.Module, *, trained: bool = False) -> dict[str, tuple[int, ...]]:
    kept = {name: each for name, each in model.named_parameters() if each.requires_grad or not trained}
    return {name: tuple(each.shape) for name, each in kept.items()}
