"""What the lean forward takes of other libraries that is not documented there, each name by itself."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft.tuners.lora import layer as peft_layer
from transformers import AttentionMaskInterface, LlamaForCausalLM, MistralConfig, PretrainedConfig, Trainer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from trl.trainer import sft_trainer, utils

from loraplus_hydra.training.lean.frozen import Frozen
from tests.support.lean import adapted


def test_a_config_s_attention_can_be_switched_with_its_parts() -> None:
    config = PretrainedConfig()
    config._attn_implementation = "eager"
    assert config._attn_implementation == "eager"


def test_an_attention_of_ones_own_is_asked_for_its_mask() -> None:
    config = MistralConfig(sliding_window=4)
    ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    asked: list[Any] = []
    AttentionMaskInterface.register("asked", lambda **given: asked.append(given))  # type: ignore[arg-type]
    config._attn_implementation = "asked"
    arguments = (config, torch.zeros(1, 6, 16), None, None, ids)

    assert create_causal_mask(*arguments) is None
    assert create_sliding_window_causal_mask(*arguments) is None
    create_causal_mask(*arguments, and_mask_function=lambda *_: True)

    assert [each.get("local_size") for each in asked] == [None, 4, None]
    assert [each["use_vmap"] for each in asked] == [False, False, True]


def test_transformers_marks_the_models_that_use_its_attention_interface() -> None:
    assert LlamaForCausalLM._supports_attention_backend is True
    assert transformers.BloomForCausalLM._supports_attention_backend is False


def test_trl_asks_for_scores_and_reads_them_from_one_output() -> None:
    fields = inspect.signature(utils.FusedCausalLMOutput).parameters
    assert {"loss", "log_probs", "entropy", "is_top1", "label_mask"} <= fields.keys()
    source = inspect.getsource(sft_trainer.SFTTrainer.compute_loss)
    assert "fused_lm_head=True" in source
    assert {name for name in fields if f"outputs.{name}" in source} <= {
        *("log_probs", "entropy", "is_top1", "label_mask", "aux_loss")
    }


def test_peft_s_linear_layer_has_what_is_read_of_it() -> None:
    layer = adapted("llama").base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is peft_layer.Linear
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "lora_variant", "fan_in_fan_out"):
        assert hasattr(layer, name)
    assert (layer.active_adapters, layer.disable_adapters, layer.merged) == (["default"], False, False)


def test_the_trainer_asks_its_accelerator_and_model_for_what_is_kept() -> None:
    assert "self.accelerator.clip_grad_norm_(model.parameters()" in inspect.getsource(Trainer._clip_grad_norm)
    assert "self.model.num_parameters(exclude_embeddings=True)" in inspect.getsource(Trainer.floating_point_ops)
    assert list(inspect.signature(Accelerator.clip_grad_norm_).parameters)[1:3] == ["parameters", "max_norm"]


def test_onednn_s_packed_products_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them BLAS multiplies: slower on some processors, and never wrong."""
    weight = torch.randn(3, 4)
    assert Frozen(weight, packed=True)._packed is not None

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    without = Frozen(weight, packed=True)
    assert without._packed is None
    assert torch.equal(without.forward(torch.ones(2, 4)), torch.ones(2, 4) @ weight.T)
