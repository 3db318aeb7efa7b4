"""The lean forward of one model: the backbone on joined rows, and scores of supervised tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

from loraplus_hydra.training.lean.attention import (
    UnknownBatchError,
    UnknownModelError,
    attention_by_rows,
    rows_underway,
)
from loraplus_hydra.training.lean.frozen import Frozen, should_pack
from loraplus_hydra.training.lean.head import log_probabilities, score
from loraplus_hydra.training.lean.layers import lend_lean_layers
from loraplus_hydra.training.lean.rows import Rows, positions

IGNORED = -100  # transformers' label of a token without loss
FUSED = "fused_lm_head"  # argument with which TRL's trainers request scores instead of logits
# The arguments that a batch may have. With any other argument that isn't None or False, the model runs plain.
_KNOWN = frozenset(
    ("input_ids", "attention_mask", "token_type_ids", "labels", "num_items_in_batch", "use_cache", "return_dict", FUSED)
)


class LeanForward:
    """Runs a model's backbone on joined rows. Outside of these calls the model is unchanged.

    `model` is a transformers model with an adapter's layers in it, for causal language modelling or classification.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.backbone = model.base_model
        self._run_backbone = self.backbone.forward
        linears = [each for each in model.modules() if isinstance(each, nn.Linear) and not each.weight.requires_grad]
        self._packed = should_pack(each.weight for each in linears)
        # Only the backbone runs on joined rows. The output layer is packed in `_supervised`.
        lend_lean_layers(self.backbone, lambda: rows_underway() is not None, packed=self._packed)
        if isinstance(pooler := getattr(self.backbone, "pooler", None), nn.Module):
            pooler.register_forward_pre_hook(self._padded_for_pooler)
        self._frozen_head: Frozen | None = None

    def classified(self, classify: Callable[..., Any], batch: Mapping[str, Any]) -> Any:
        """Return the output of `classify`, the model's own forward, with the backbone on joined rows."""
        self.backbone.forward = self._padded_output
        try:
            return classify(**batch)
        finally:
            self.backbone.forward = self._run_backbone

    def _padded_output(self, *args: Any, **kwargs: Any) -> Any:
        """Return the backbone's output for a padded batch. Its last hidden state is padded again."""
        output, rows = self._joined_output(batch_of(args, kwargs))
        output.last_hidden_state = rows.pad(output.last_hidden_state)
        return output

    def fused_output(self, batch: Mapping[str, Any]) -> FusedCausalLMOutput:
        """Return the output of TRL's fused head.

        The output has a score for each label, [rows, columns - 1], and zero if there is no label.
        """
        tokens, scored = self._supervised(batch)
        scores = score(*tokens)
        items = batch.get("num_items_in_batch")
        log_probs, entropy, is_top1 = (each.new_zeros(scored.shape).masked_scatter(scored, each) for each in scores)
        return FusedCausalLMOutput(
            loss=-scores.log_probs.sum() / (scored.sum().clamp(min=1) if items is None else items),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=scored,
        )

    def causal_output(self, batch: Mapping[str, Any]) -> CausalLMOutputWithPast:
        """Return the output of transformers' causal models, with the loss but without logits."""
        tokens, scored = self._supervised(batch)
        items = batch.get("num_items_in_batch")
        return CausalLMOutputWithPast(
            loss=-log_probabilities(*tokens).sum() / (scored.sum() if items is None else items)
        )

    def _supervised(self, batch: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
        """Return the arguments of `score` for a batch, and the mask of labels, [rows, columns - 1]."""
        output, rows = self._joined_output(batch)
        labels = batch["labels"][:, 1:]
        scored = labels != IGNORED
        # The token before a label predicts it.
        places = rows.places(nn.functional.pad(scored, (0, 1)))
        if places is None:
            raise UnknownBatchError("a label follows a masked token")
        layer = self.model.get_output_embeddings()
        if self._frozen_head is None or self._frozen_head.weight is not layer.weight:
            self._frozen_head = Frozen(layer.weight, packed=self._packed)
        return (output.last_hidden_state[0], places, labels[scored], self._frozen_head, layer.bias), scored

    def _joined_output(self, batch: Mapping[str, Any]) -> tuple[Any, Rows]:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        rows = Rows.of(mask) if mask.shape == ids.shape else None
        if rows is None:
            raise UnknownBatchError("a row of the batch is empty")
        joined = {
            name: rows.join(batch[name]) for name in ("input_ids", "token_type_ids") if batch.get(name) is not None
        }
        joined["position_ids"] = rows.join(self._positions(ids, mask))
        with attention_by_rows(self.backbone.config, rows):
            return self._run_backbone(**joined, use_cache=False, return_dict=True), rows

    def _positions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the position ids, [rows, columns], that the model itself would make."""
        embeddings: Any = getattr(self.backbone, "embeddings", None)
        own = getattr(embeddings, "create_position_ids_from_input_ids", None)  # RoBERTa and similar models
        return positions(mask) if own is None else own(ids, embeddings.padding_idx)

    def _padded_for_pooler(self, pooler: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Pass padded rows to the pooler, because it uses each row's first token."""
        rows = rows_underway()
        if rows is None:
            return None
        if inputs[0].shape[:2] != (1, rows.tokens):
            raise UnknownModelError("its pooler doesn't choose tokens")
        return (rows.pad(inputs[0]), *inputs[1:])


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's call as a batch.

    Raises UnknownBatchError for an unknown argument.
    """
    batch = {**kwargs, **({"input_ids": args[0]} if args else {})}
    strange = [name for name, value in batch.items() if name not in _KNOWN and value is not None and value is not False]
    if strange or len(args) > 1:
        raise UnknownBatchError(f"the model is called with {', '.join(strange) or 'several arguments without names'}")
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or batch.get("return_dict") is False:
        raise UnknownBatchError("the model is not called with rows of token ids")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise UnknownBatchError("the attention mask is not one number for each token")
    return batch


def takes_positions(backbone: nn.Module) -> bool:
    """Return True if a backbone has an argument for positions."""
    return "position_ids" in inspect.signature(backbone.forward).parameters
