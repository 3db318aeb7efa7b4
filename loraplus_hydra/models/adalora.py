"""AdaLoRA in an HF Trainer: its schedule of ranks follows the run's steps, and its penalty reaches every loss alike.

AdaLoRA (arXiv 2303.10512) starts each layer at rank `init_r`, trains `tinit` steps so, then cuts ranks to `target_r` on
average, and trains the last `tfinal` steps at those. Neither the Trainer nor TRL calls PEFT's `update_and_allocate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from loraplus_hydra.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

IMPORTANCE_FILE = "adalora.safetensors"  # beside a checkpoint's weights: the moving averages that ranks are cut by
ADAPTER = "default"
_PLACEHOLDER_STEPS = 2**31  # PEFT wants a number before anyone knows the run's steps


def placeholder_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """AdaLoraConfig's arguments with a schedule that does nothing, for `AdaLoraCallback` to replace."""
    return {**arguments, "tinit": 0, "tfinal": 0, "total_step": _PLACEHOLDER_STEPS}


def phases(total: int, tinit: float, tfinal: float) -> tuple[int, int]:
    """Steps of the first and of the last phase in a run of `total` steps; below 1 they are shares of the run.

    At least two steps stay between them: ranks are cut by what a step has shown. Raises UserError where they can't.
    """
    first = round(tinit * total) if tinit < 1 else int(tinit)
    last = round(tfinal * total) if tfinal < 1 else int(tfinal)
    if tfinal < 1:
        last = max(0, min(last, total - first - 2))
    if total - first - last < 2:
        raise UserError(
            f"adapter.tinit and adapter.tfinal: {first} and {last} steps leave fewer than two of the run's {total} to "
            "cut the ranks in; make them smaller (below 1 they are shares of the run), or the run longer"
        )
    return first, last


class AdaLoraCallback(TrainerCallback):
    """Calls `update_and_allocate` after each optimizer step, when the gradients are still there.

    `tinit` and `tfinal` are steps, or below 1 shares of the run. The orthogonality penalty goes into the gradients once
    an optimizer step, behind their clipping, and never into a loss. PEFT adds it to the model's own loss: evaluation's
    too, once more for each accumulated batch, and not at all under TRL's SFTTrainer, which makes its loss itself.
    """

    def __init__(self, model: PeftModel, tinit: float, tfinal: float) -> None:
        self.tuner: Any = model.base_model
        self.config: Any = model.peft_config[ADAPTER]
        self.tinit, self.tfinal = tinit, tfinal
        self.penalty_weight = float(self.config.orth_reg_weight)
        self.config.orth_reg_weight = 0.0
        self.kept: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.total_step = state.max_steps
        self.config.tinit, self.config.tfinal = phases(state.max_steps, self.tinit, self.tfinal)
        if state.global_step > 0:
            self._restore(args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        factors = [p for name, p in self.tuner.model.named_parameters() if _is_factor(name)]
        if not self.penalty_weight or not factors:
            return
        with torch.enable_grad():
            penalty = self.penalty_weight * orthogonality(self.tuner.model)
            gradients = torch.autograd.grad(penalty, factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient if factor.grad is None else factor.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # While it trains, the config has no rank pattern: with one, PEFT saves cut tensors, which fit neither the model
        # nor the optimizer's state that a checkpoint is resumed with.
        self.config.rank_pattern = self.kept
        self.tuner.update_and_allocate(state.global_step + 1)
        self.kept, self.config.rank_pattern = self.config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from safetensors.torch import save_file

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        allocator = self.tuner.rankallocator
        averages = {f"ipt.{name}": tensor for name, tensor in allocator.exp_avg_ipt.items()}
        averages |= {f"unc.{name}": tensor for name, tensor in allocator.exp_avg_unc.items()}
        if state.is_world_process_zero:
            save_file({name: tensor.contiguous() for name, tensor in averages.items()}, folder / IMPORTANCE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.orth_reg_weight = self.penalty_weight
        self.config.rank_pattern = kept_ranks(self.tuner.model)

    def _restore(self, args: Any, state: Any) -> None:
        from safetensors.torch import load_file
        from transformers.trainer_utils import get_last_checkpoint

        given = args.resume_from_checkpoint
        folder = Path(given if isinstance(given, str) else get_last_checkpoint(args.output_dir))
        if not (folder / IMPORTANCE_FILE).is_file():
            raise UserError(f"trainer.resume_from_checkpoint: {folder} lacks {IMPORTANCE_FILE}, AdaLoRA's part of it")
        allocator, device = self.tuner.rankallocator, next(self.tuner.parameters()).device
        for name, tensor in load_file(folder / IMPORTANCE_FILE).items():
            kind, _, parameter = name.partition(".")
            averages = allocator.exp_avg_ipt if kind == "ipt" else allocator.exp_avg_unc
            averages[parameter] = tensor.to(device)
            allocator.ipt[parameter] = torch.zeros_like(averages[parameter])  # PEFT takes a known name for "begun"
        if state.global_step >= self.config.total_step - self.config.tfinal:
            self.kept = kept_ranks(self.tuner.model)


def freeze_rank_numbers(model: torch.nn.Module) -> None:
    """AdaLoRA's counts of ranks don't train; PEFT forgets it of those that it makes on the meta device."""
    for name, parameter in model.named_parameters():
        if name.endswith(f".ranknum.{ADAPTER}"):
            parameter.requires_grad = False


def orthogonality(model: torch.nn.Module) -> torch.Tensor:
    """The mean over all factors of how far each is from having orthonormal rows (A) or columns (B), as in PEFT."""
    distances = []
    for name, factor in model.named_parameters():
        if _is_factor(name):
            products = factor @ factor.T if ".lora_A." in name else factor.T @ factor
            distances.append(torch.norm(products - torch.eye(len(products), device=factor.device, dtype=factor.dtype)))
    return torch.stack(distances).mean()


def kept_ranks(model: torch.nn.Module) -> dict[str, list[bool]]:
    """Which singular values of each layer are in use: a cut one is exactly zero, and leaving it out changes nothing."""
    values = ((name, p) for name, p in model.named_parameters() if f"lora_E.{ADAPTER}" in name)
    return {name: value.detach().ne(0).view(-1).tolist() for name, value in values}


def _is_factor(name: str) -> bool:
    return name.endswith((f"lora_A.{ADAPTER}", f"lora_B.{ADAPTER}"))
