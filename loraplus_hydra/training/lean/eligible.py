"""Rules for runs that can have the lean forward, and for those to which `auto` gives it."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from loraplus_hydra.training.lean.forward import takes_positions

# Settings by which transformers' models change their logits after the output layer.
_CHANGES_LOGITS = (
    *("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling"),
    *("output_multiplier", "lm_head_multiplier"),
)


def reason_against(trainer: Any) -> str | None:
    """Return why a Trainer can't have the lean forward, as the end of a sentence; None if it can."""
    return next((text for holds, text in _reasons(trainer) if holds), None)


def _reasons(trainer: Any) -> Any:
    """Yield conditions and what to report if they hold, cheap and general ones first."""
    args = trainer.args
    yield args.world_size > 1 or args.n_gpu > 1, "several processes train it"
    yield trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled, "DeepSpeed or FSDP runs it"
    yield (
        type(trainer).compute_loss not in (Trainer.compute_loss, SFTTrainer.compute_loss),
        (f"{_name(trainer)} computes its own loss"),
    )
    yield trainer.compute_loss_func is not None, "the loss is a function of the task's own"
    yield args.label_smoothing_factor > 0, "label smoothing needs all logits (trainer.label_smoothing_factor)"
    yield args.neftune_noise_alpha is not None, "NEFTune adds noise to padded embeddings (trainer.neftune_noise_alpha)"
    yield args.activation_checkpointing, "activations are recomputed (trainer.activation_checkpointing)"
    yield args.torch_compile, "the model is compiled (trainer.torch_compile)"
    yield args.use_liger_kernel, "Liger's kernels replace the model's layers (trainer.use_liger_kernel)"
    yield args.fp16 or args.fp16_full_eval or args.bf16_full_eval, "its dtype changes between training and evaluation"
    for name in ("packing", "eval_packing", "padding_free"):
        yield getattr(args, name, None), f"its rows are packed already (task.args.{name})"
    yield from _reasons_of_model(trainer.model)


def _reasons_of_model(model: Any) -> Any:
    yield not isinstance(model, PeftModel), "it has no adapter"
    settings = model.active_peft_config
    yield type(settings) is not LoraConfig, f"its adapter is {type(settings).__name__}, not LoraConfig"
    yield bool(settings.alora_invocation_tokens), "activated LoRA looks for tokens in padded rows"
    yield bool(settings.arrow_config), "Arrow routes each token among adapters"
    base = model.get_base_model()
    yield base.config.is_encoder_decoder, "it is an encoder with a decoder"
    yield base.base_model is base, "it has no backbone of its own"
    yield not type(base)._supports_attention_backend, "its attention is not behind transformers' attention interface"
    yield not takes_positions(base.base_model), "it takes no positions of tokens"
    yield bool(getattr(base.config, "output_router_logits", False)), "its experts' routing has a loss of its own"
    settings = base.config.get_text_config()
    for name in _CHANGES_LOGITS:
        yield getattr(settings, name, None) not in (None, 1), f"its logits are scaled or capped ({name})"
    head = base.get_output_embeddings()
    yield head is not None and not _is_frozen_linear(head), "the output layer is trained or is no plain linear layer"


def reason_against_auto(trainer: Any) -> str | None:
    """Return why `auto` leaves an eligible run plain: a rule, so that equal runs are always run alike."""
    if trainer.args.device.type != "cpu":
        return "it has not been measured on a GPU yet (trainer.forward=lean forces it)"
    return None


def _is_frozen_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not any(parameter.requires_grad for parameter in layer.parameters())


def _name(trainer: Any) -> str:
    """Return the name of the Trainer class that the config names, without our mixins."""
    return next(each.__name__ for each in type(trainer).__mro__ if not each.__module__.startswith("loraplus_hydra"))
