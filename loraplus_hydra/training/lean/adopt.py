"""Speed-ups of a Trainer's steps, among them the lean forward pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraplus_hydra.io import screen
from loraplus_hydra.training.allocator import keep_freed_memory
from loraplus_hydra.training.gpu_attention import skip_cudnn_attention
from loraplus_hydra.training.lean.attention import UnknownBatchError, UnknownModelError
from loraplus_hydra.training.lean.eligible import reason_against, reason_against_auto
from loraplus_hydra.training.lean.first_batch import Entry, disagreement, is_padded_ahead
from loraplus_hydra.training.lean.forward import FUSED, LeanForward, batch_of
from loraplus_hydra.training.module_walks import walk_once

AUTO, LEAN, PLAIN = "auto", "lean", "plain"


def adopt(trainer: Any, forward: str) -> None:
    """Make a Trainer's steps faster.

    On a CPU, freed memory is reused. On a GPU, attention compiles no kernel for each length. In one process, walks over
    modules are made once. `forward` is `trainer.forward`.

    The lean forward is used from the next batch on. If a run can't use it, the run trains without it, and the reason is
    shown on the screen.
    """
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    if trainer.args.device.type == "cuda":
        skip_cudnn_attention()
    if (
        trainer.args.world_size == 1
        and trainer.args.n_gpu <= 1
        and not trainer.is_deepspeed_enabled
        and not trainer.is_fsdp_enabled
    ):
        walk_once(trainer)
    use_lean(trainer, forward)


def use_lean(trainer: Any, forward: str, *, compare: bool = True) -> None:
    """Make a Trainer's model run the lean forward, if the run can use it and `forward` does not forbid it.

    With `compare`, the first batch of each kind is computed by both forwards, and the choice is shown on the screen.
    """
    if forward == PLAIN:
        return
    reason = reason_against(trainer) or (reason_against_auto(trainer) if forward == AUTO else None)
    if reason is not None:
        if compare:
            _report_plain(reason)
        return
    model = trainer.model.get_base_model()
    lean = LeanForward(model)
    is_classifier = model.get_output_embeddings() is None
    entry = functools.partial(lean.classified, model.forward) if is_classifier else functools.partial(_causal, lean)
    _install(model, entry, _State(compare=compare))


def _causal(lean: LeanForward, batch: Mapping[str, Any]) -> Any:
    if batch.get("labels") is None:
        raise UnknownBatchError("there are no labels")
    return lean.fused_output(batch) if batch.get(FUSED) else lean.causal_output(batch)


def _install(model: Any, lean: Entry, state: _State) -> None:
    """Replace a model's forward. Calls that the lean forward can't handle use the original forward."""
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not state.is_lean:
            return plain(*args, **kwargs)
        try:
            batch = batch_of(args, kwargs)
            if state.is_new(batch):
                state.check(model, lambda some: plain(**some), lean, batch)
            return lean(batch) if state.is_lean else plain(*args, **kwargs)
        except UnknownBatchError as error:
            state.report_batch(str(error))
        except UnknownModelError as error:
            state.stay_plain(str(error))
        return plain(*args, **kwargs)

    model.forward = forward


class _State:
    """The choice between both forwards, decided by the first batch of each kind."""

    def __init__(self, *, compare: bool) -> None:
        self.is_lean = True
        self._compare = compare
        self._checked: set[tuple[bool, frozenset[str]]] = set()
        self._reported: set[str] = set()

    def is_new(self, batch: Mapping[str, Any]) -> bool:
        """Return True if no batch of this kind has been compared.

        A batch's kind is its arguments and the side of its padding.
        """
        return self._compare and self._kind(batch) not in self._checked

    def check(self, model: Any, plain: Entry, lean: Entry, batch: Mapping[str, Any]) -> None:
        """Compare both forwards on a batch. If they differ, use the plain forward."""
        reason = disagreement(model, plain, lean, batch)
        if reason is not None:
            self.stay_plain(reason)
        elif not self._checked:
            screen.show("    Forward pass: lean, without padding (trainer.forward)")
        self._checked.add(self._kind(batch))

    def stay_plain(self, reason: str) -> None:
        self.is_lean = False
        _report_plain(reason)

    @staticmethod
    def _kind(batch: Mapping[str, Any]) -> tuple[bool, frozenset[str]]:
        return is_padded_ahead(batch), frozenset(name for name, value in batch.items() if isinstance(value, Tensor))

    def report_batch(self, reason: str) -> None:
        """Report why a training batch runs plain, each reason only once. Generation is ignored."""
        if torch.is_grad_enabled() and reason not in self._reported:
            self._reported.add(reason)
            screen.show(f"    Forward pass: plain for some batches, because {reason}")


def _report_plain(reason: str) -> None:
    screen.show(f"    Forward pass: plain, because {reason}")
