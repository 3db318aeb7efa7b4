"""Support for an adapted output layer in TRL's trainers.

To save the memory of the logits, TRL multiplies by the output layer's weight itself (`add_fused_lm_head`, TRL 1.16).
This fails if the layer has an adapter, or rows of new tokens.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from loraplus_hydra.errors import Problem


def score_with_whole_head(model: Any) -> None:
    """Make the output layer compute its own logits if it has an adapter.

    `model` is a PeftModel that TRL has patched. The logits need memory for batch x tokens x vocabulary numbers.
    """
    base = model.get_base_model()
    if not isinstance(base.get_output_embeddings(), (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return
    inner = base.forward

    @functools.wraps(type(base).forward)  # `generate` reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("fused_lm_head", False):
            return inner(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        output = inner(*args, **{**kwargs, "use_cache": False})
        logits = output.logits[:, :-1] if shifted is None else output.logits
        return _scored(logits.float(), labels[:, 1:] if shifted is None else shifted, items, output)

    base.forward = types.MethodType(forward, base)


def head_problem(model: Any, trainer: str) -> Problem | None:
    """Return a Problem if TRL's trainer can't train an adapter on the output layer."""
    if not isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer) or not trainer.startswith("trl."):
        return None
    name = trainer.rpartition(".")[2]
    fix = "remove it, or train the whole layer: +adapter.modules_to_save=[lm_head]"
    return Problem("adapter.target_modules", f"TRL's {name} can't train an adapter on the output layer", fix)


def _scored(logits: torch.Tensor, labels: torch.Tensor, items: Any, output: Any) -> Any:
    """Return the output that TRL's trainers expect from a fused forward pass."""
    from trl.trainer.utils import FusedCausalLMOutput

    labels = labels.to(logits.device)
    mask = labels != -100
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    log_probs = (-losses).masked_fill(~mask, 0.0)
    with torch.no_grad():
        distribution = torch.log_softmax(logits, -1)
        entropy = -(distribution.exp() * distribution).sum(-1).masked_fill(~mask, 0.0)
        is_top1 = (logits.argmax(-1) == labels) & mask
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / (mask.sum().clamp(min=1) if items is None else items),
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=getattr(output, "aux_loss", None),
    )
