"""EVA's pass over the training rows, before the first step.

A resumed run takes the ranks from its checkpoint instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel, get_eva_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed

from loraplus_hydra.data.rows import is_streamed
from loraplus_hydra.errors import UserError, first_line, first_of
from loraplus_hydra.io import interrupts, screen
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME, EVA
from loraplus_hydra.models.eva import linear_layers, numbers_needed, own_name, start_from

_MOST = 1000  # batches of the pass; a few dozen are usual


def start_from_rows(trainer: Any, model: PeftModel, seed: int) -> None:
    """Measure the directions of the layers' inputs on the Trainer's rows, and start the adapter from them.

    The batches are the run's own, in the order of `seed`. As in PEFT, the tokens with loss count, or with
    `eva_config.use_label_mask=false` all tokens. Raises UserError.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # set without the config, which was checked
        raise UserError("EVA needs the whole base model, which FSDP and DeepSpeed may split")
    screen.show("    EVA: a pass over the training rows decides the ranks")
    batches = _Batches(trainer, model, seed)
    # Each process passes over all rows, because a process that only waits would reach its time limit
    found = [{name: matrix.cpu() for name, matrix in _directions(model, batches).items()}]
    if trainer.args.world_size > 1:
        broadcast_object_list(found)  # rounding may differ between processes, and with it a rank
    set_seed(seed)  # for the start of layers without directions
    start_from(model, found[0])
    ranks = [len(matrix) for matrix in found[0].values()]
    screen.show(f"    EVA: {batches.read} batches; ranks from {min(ranks)} to {max(ranks)} in {len(ranks)} layers")


class _Part(nn.Module):
    """The model as a part of a model, in which PEFT measures exactly the layers that a config names."""

    # In a PeftModel, PEFT 0.21.2 also takes the rows of new tokens for a linear layer, and a pooler for one with an
    # input for each token.
    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model


def _directions(model: PeftModel, batches: _Batches) -> dict[str, torch.Tensor]:
    """Return the directions of each layer that gets the inputs of tokens, by the layer's name."""
    accepted = inspect.signature(model.get_base_model().forward).parameters.keys() - {"labels"}

    def forward(_: Any, inputs: dict[str, torch.Tensor]) -> None:
        model(**{name: inputs[name].to(batches.device) for name in inputs.keys() & accepted})

    own = model.peft_config[ADAPTER_NAME]
    with torch.no_grad(), model.disable_adapter():
        layers = _layers_of_tokens(model, batches, forward)
        names = {f"model.{name}.base_layer": name for name in layers}
        ranks = {inner: layers[name].r[ADAPTER_NAME] for inner, name in names.items()}
        config = LoraConfig(
            r=own.r,
            target_modules=list(names),
            rank_pattern={inner: rank for inner, rank in ranks.items() if rank != own.r},
            init_lora_weights=EVA,
            eva_config=own.eva_config,
        )
        try:
            found = get_eva_state_dict(
                _Part(model),
                batches,
                config,
                forward_fn=forward,
                prepare_model_inputs_fn=_counted,
                prepare_layer_inputs_fn=lambda given, mask, _: given[0][mask],
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
        except UserError:
            raise
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise UserError(f"EVA's pass over the rows failed: {first_line(error)}; use adapter=lora") from error
    return {names[inner]: matrix for inner, matrix in found.items()}


def _layers_of_tokens(model: PeftModel, batches: _Batches, forward: Callable[..., None]) -> dict[str, LoraLayer]:
    """Return the layers whose input has a vector for each token. Raises UserError if there is none."""
    layers, inputs = linear_layers(model), next(iter(batches))
    found: set[str] = set()

    def look(name: str) -> Callable[..., None]:
        return lambda _, given: found.add(name) if given[0].shape[:-1] == inputs["input_ids"].shape else None

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    others = [own_name(name) for name in layers if name not in found]
    if not found:
        raise UserError(f"EVA needs layers with an input for each token, and none is adapted: {first_of(others, 3)}")
    if others:
        text = "has no input for each token, so its adapter starts as usual"
        screen.show(f"    EVA: {first_of(others, 3)} {text}")
    return {name: layer for name, layer in layers.items() if name in found}


class _Batches:
    """Batches of training rows without an end, because PEFT reads until the directions no longer change."""

    def __init__(self, trainer: Any, model: PeftModel, seed: int) -> None:
        if is_streamed(trainer.train_dataset):
            raise UserError(
                "EVA's pass reads the rows before the training does, so it needs rows that are not streamed"
            )
        loader = trainer.get_train_dataloader()  # has the columns that the model takes, and the function for a batch
        self.rows, self.collate = loader.dataset, loader.collate_fn
        self.size = min(trainer.args.per_device_train_batch_size, len(self.rows))
        self.config = model.peft_config[ADAPTER_NAME]
        self.needed = numbers_needed(model)
        self.seed = seed
        self.device = trainer.args.device
        self.read = 0

    def __len__(self) -> int:
        return len(self.rows) // self.size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(
            self.rows, self.size, shuffle=True, generator=order, drop_last=True, collate_fn=self.collate
        )
        self.read = 0
        for seen, batch in enumerate(chain.from_iterable(repeat(loader))):
            interrupts.stop_if_asked()
            if seen == _MOST or (seen == len(self) and self.read == 0):
                raise UserError(self._why_no_end(seen))
            inputs = self._with_labels(batch)
            if int(_counted(inputs, self.config).sum()) >= self.needed:  # PEFT can't use a smaller batch
                self.read += 1
                yield inputs

    def _why_no_end(self, seen: int) -> str:
        if self.read == 0:
            return (
                f"EVA needs {self.needed} tokens in a batch (2 x r x rho), and none of {seen} batches has as many that "
                "count: use a larger trainer.per_device_train_batch_size, adapter.eva_config.use_label_mask=false, or "
                "a lower adapter.r or adapter.eva_config.rho"
            )
        return (
            f"EVA's directions still change after {seen} batches, and {self.read} of them have the {self.needed} "
            "tokens that it needs: use a lower adapter.eva_config.tau, adapter.r or adapter.eva_config.rho, or a "
            "larger trainer.per_device_train_batch_size"
        )

    def _with_labels(self, batch: Any) -> dict[str, Any]:
        """Return a batch with a label for each token, or without labels."""
        inputs = dict(batch)
        if "input_ids" not in inputs:
            raise UserError("EVA starts from the inputs of tokens, but the batches of this task have no tokens")
        ids, labels = inputs["input_ids"], inputs.pop("labels", None)
        if labels is None and "completion_mask" in inputs:  # TRL's preferences
            labels = ids.masked_fill(inputs["completion_mask"] == 0, self.config.eva_config.label_mask_value)
        if labels is not None and labels.shape == ids.shape:  # otherwise a classifier's, one for each row
            inputs["labels"] = labels
        return inputs


def _counted(inputs: dict[str, Any], config: Any) -> torch.Tensor:
    """Return the mask of a batch's tokens that count."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    if config.eva_config.use_label_mask and "labels" in inputs:
        mask &= inputs["labels"] != config.eva_config.label_mask_value
    return mask
