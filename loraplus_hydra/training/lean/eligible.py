"""The conditions for the lean forward, and for `trainer.forward=auto`."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from loraplus_hydra.training.lean.forward import takes_positions

# Settings with which transformers' models change their logits after the output layer.
_CHANGES_LOGITS = (
    *("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling"),
    *("output_multiplier", "lm_head_multiplier"),
)


def reason_against(trainer: Any) -> str | None:
    """Return why a Trainer can't use the lean forward, as the end of a sentence; None if it can."""
    return next((text for holds, text in _reasons(trainer) if holds), None)


def _reasons(trainer: Any) -> Any:
    """Yield (condition, reason) pairs. Fast and general conditions come first."""
    args = trainer.args
    yield args.world_size > 1 or args.n_gpu > 1, "several processes train the model"
    yield trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled, "DeepSpeed or FSDP runs the model"
    yield (
        type(trainer).compute_loss not in (Trainer.compute_loss, SFTTrainer.compute_loss),
        f"{_name(trainer)} computes its own loss",
    )
    yield trainer.compute_loss_func is not None, "the task has its own loss function"
    yield args.label_smoothing_factor > 0, "label smoothing needs all logits (trainer.label_smoothing_factor)"
    yield args.neftune_noise_alpha is not None, "NEFTune adds noise to padded embeddings (trainer.neftune_noise_alpha)"
    yield args.activation_checkpointing, "activations are recomputed (trainer.activation_checkpointing)"
    yield args.torch_compile, "the model is compiled (trainer.torch_compile)"
    yield args.use_liger_kernel, "Liger's kernels replace the model's layers (trainer.use_liger_kernel)"
    yield (
        args.fp16 or args.fp16_full_eval or args.bf16_full_eval,
        "the model's dtype changes between training and evaluation",
    )
    for name in ("packing", "eval_packing", "padding_free"):
        yield getattr(args, name, None), f"the rows are already packed (task.args.{name})"
    yield from _reasons_of_model(trainer.model)
    has_output_layer = trainer.model.get_base_model().get_output_embeddings() is not None
    yield has_output_layer and trainer.compute_metrics is not None, "the task's metrics need all logits"


def _reasons_of_model(model: Any) -> Any:
    yield not isinstance(model, PeftModel), "the model has no adapter"
    settings = model.active_peft_config
    yield type(settings) is not LoraConfig, f"the adapter is {type(settings).__name__}, not LoraConfig"
    yield bool(settings.alora_invocation_tokens), "activated LoRA searches for tokens in padded rows"
    yield bool(settings.arrow_config), "Arrow routes each token among adapters"
    base = model.get_base_model()
    yield base.config.is_encoder_decoder, "the model is an encoder with a decoder"
    yield base.base_model is base, "the model has no separate backbone"
    yield not type(base)._supports_attention_backend, "the model doesn't use transformers' attention interface"
    yield not takes_positions(base.base_model), "the model has no argument for the tokens' positions"
    yield bool(getattr(base.config, "output_router_logits", False)), "the experts' routing has its own loss"
    settings = base.config.get_text_config()
    for name in _CHANGES_LOGITS:
        yield getattr(settings, name, None) not in (None, 1), f"the model's logits are scaled or capped ({name})"
    head = base.get_output_embeddings()
    yield (
        head is not None and not _is_frozen_linear(head),
        "the output layer is trained or not a plain linear layer",
    )


def reason_against_auto(trainer: Any) -> str | None:
    """Return why `auto` uses the plain forward for an eligible run, or None.

    The decision depends only on the config and the machine, so equal runs are always computed in the same way.
    """
    if trainer.args.device.type != "cpu":
        return "the lean forward was not faster on the GPU that was measured (trainer.forward=lean forces it)"
    return None


def _is_frozen_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not any(parameter.requires_grad for parameter in layer.parameters())


def _name(trainer: Any) -> str:
    """Return the name of the config's Trainer class, before this program's mixins are added."""
    return next(each.__name__ for each in type(trainer).__mro__ if not each.__module__.startswith("loraplus_hydra"))
