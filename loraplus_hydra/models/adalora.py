"""AdaLoRA with a Hugging Face Trainer: the schedule of ranks, and the penalty.

AdaLoRA (arXiv 2303.10512) trains each layer at rank `init_r` for `tinit` steps. Then it cuts ranks until their mean is
`target_r`, and trains the last `tfinal` steps at the remaining ranks. Neither the Trainer nor TRL calls PEFT's
`update_and_allocate`, so the callback here does. Other modules use this module only through `models.adapter.SCHEDULES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from loraplus_hydra.errors import Problem, UserError
from loraplus_hydra.loraplus.peft_layers import ADAPTER_NAME

IMPORTANCE_FILE = "adalora.safetensors"  # file of a checkpoint with the moving averages that decide which ranks are cut
_PLACEHOLDER_STEPS = 2**31  # PEFT requires total_step before the run's number of steps is known


def config_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return AdaLoraConfig's arguments with a placeholder schedule, which `AdaLoraCallback` replaces."""
    return {**arguments, "tinit": 0, "tfinal": 0, "total_step": _PLACEHOLDER_STEPS}


def problems(adapter: Mapping[str, Any], trainer: Mapping[str, Any]) -> list[Problem]:
    """Check the schedule in an `adapter` group against the steps in a `trainer` group."""
    found = []
    if adapter.get("total_step") is not None:
        found.append(Problem("adapter.total_step", "is computed from the run's number of steps", "leave it out"))
    first, last = adapter.get("tinit", 0), adapter.get("tfinal", 0)
    for name, value in (("tinit", first), ("tfinal", last)):
        if not _is_steps_or_share(value):
            fix = "a whole number of steps, or a share of the run's steps below 1"
            found.append(Problem(f"adapter.{name}", f"{value} is out of range", f"it must be {fix}"))
    start, target = adapter.get("init_r", 12), adapter.get("target_r", 8)
    if isinstance(start, int) and isinstance(target, int) and not 1 <= target < start:
        fix = "init_r is the rank at the start, and target_r is the mean rank at the end"
        found.append(Problem("adapter.target_r", f"{target} is not below adapter.init_r = {start}", fix))
    if (interval := adapter.get("deltaT", 1)) is not None and interval == 0:
        found.append(Problem("adapter.deltaT", "0 is out of range", "it must be a whole number of steps from 1 on"))
    steps = trainer.get("max_steps")
    if not found and isinstance(steps, int) and steps > 0:
        try:
            phases(steps, first, last)
        except UserError as error:
            found.append(Problem("adapter.tinit", str(error).partition(": ")[2]))
    return found


def continue_problems(config: PeftConfig) -> list[Problem]:
    """Return a Problem if a stored adapter with this config can't be trained further."""
    if not config.rank_pattern:
        return []
    what = "AdaLoRA has cut this adapter's ranks, and can't cut them again"
    return [Problem("adapter.path", what, "merge the adapter (export) and start from the merged model")]


def finish_meta_model(model: torch.nn.Module) -> None:
    """Freeze the tensors with the number of ranks in a model on the meta device."""
    # PEFT freezes these tensors itself, except on the meta device.
    for name, parameter in model.named_parameters():
        if name.endswith(f".ranknum.{ADAPTER_NAME}"):
            parameter.requires_grad = False


def callbacks(model: PeftModel, adapter: Mapping[str, Any]) -> list[TrainerCallback]:
    """Return the callbacks that a Trainer of `model` needs for its `adapter` group."""
    weight = adapter.get("orth_reg_weight")
    if weight is not None:  # a continued adapter's config has the weight of the earlier run
        model.peft_config[ADAPTER_NAME].orth_reg_weight = float(weight)
    return [AdaLoraCallback(model, tinit=adapter.get("tinit", 0), tfinal=adapter.get("tfinal", 0))]


class AdaLoraCallback(TrainerCallback):
    """The schedule of ranks and the penalty in one run.

    `tinit` and `tfinal` are steps, or shares of the run if they are below 1. The penalty on factors that aren't
    orthogonal is added to the gradients once per optimizer step, after clipping, and never to a loss. PEFT adds the
    penalty to the model's own loss instead. It is then also part of an evaluation's loss, counted once for each
    accumulated batch, and ignored by TRL's SFTTrainer, which computes its own loss.
    """

    def __init__(self, model: PeftModel, tinit: float, tfinal: float) -> None:
        self.tuner: Any = model.base_model
        self.config: Any = model.peft_config[ADAPTER_NAME]
        self.tinit, self.tfinal = tinit, tfinal
        self.penalty_weight = float(self.config.orth_reg_weight)
        # Without PEFT's penalty on the loss. The config keeps the weight, because checkpoints store the config.
        self.tuner.forward = MethodType(BaseTuner.forward, self.tuner)
        self.rank_pattern: dict[str, list[bool]] | None = None

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
        # The config has a rank pattern only inside this call, because with a rank pattern PEFT saves cut tensors. A
        # checkpoint needs uncut tensors, which fit the model and the optimizer's state.
        self.config.rank_pattern = self.rank_pattern
        self.tuner.update_and_allocate(state.global_step + 1)  # called here, because the gradients still exist
        self.rank_pattern, self.config.rank_pattern = self.config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        allocator = self.tuner.rankallocator
        averages = {f"ipt.{name}": tensor.contiguous() for name, tensor in allocator.exp_avg_ipt.items()}
        averages |= {f"unc.{name}": tensor.contiguous() for name, tensor in allocator.exp_avg_unc.items()}
        save_file(averages, Path(args.output_dir) / f"checkpoint-{state.global_step}" / IMPORTANCE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.rank_pattern = kept_ranks(self.tuner.model)

    def _restore(self, args: Any, state: Any) -> None:
        given = args.resume_from_checkpoint
        folder = Path(given if isinstance(given, str) else get_last_checkpoint(args.output_dir))
        if not (folder / IMPORTANCE_FILE).is_file():
            raise UserError(f"trainer.resume_from_checkpoint: {folder} has no {IMPORTANCE_FILE}, which AdaLoRA needs")
        allocator, device = self.tuner.rankallocator, next(self.tuner.parameters()).device
        for name, tensor in load_file(folder / IMPORTANCE_FILE).items():
            kind, _, parameter = name.partition(".")
            averages = allocator.exp_avg_ipt if kind == "ipt" else allocator.exp_avg_unc
            averages[parameter] = tensor.to(device)
            # PEFT resets averages whose names it doesn't know
            allocator.ipt[parameter] = torch.zeros_like(averages[parameter])
        if state.global_step >= self.config.total_step - self.config.tfinal:
            self.rank_pattern = kept_ranks(self.tuner.model)


def phases(total: int, tinit: float, tfinal: float) -> tuple[int, int]:
    """Return the number of steps in the first and in the last phase of a run of `total` steps.

    `tinit` and `tfinal` below 1 are shares of the run. Raises UserError if less than two steps remain between the
    phases, because ranks are cut by the gradients of earlier steps.
    """
    first = round(tinit * total) if tinit < 1 else int(tinit)
    last = round(tfinal * total) if tfinal < 1 else int(tfinal)
    if tfinal < 1:
        last = max(0, min(last, total - first - 2))
    if total - first - last < 2:
        raise UserError(
            f"adapter.tinit and adapter.tfinal: {first} and {last} of the run's {total} steps leave fewer than two "
            "steps to cut ranks; make them smaller (values below 1 are shares of the run), or make the run longer"
        )
    return first, last


def orthogonality(model: torch.nn.Module) -> torch.Tensor:
    """Return the mean distance of the factors from orthonormal rows (A) and columns (B), as in PEFT."""
    distances = []
    for name, factor in model.named_parameters():
        if _is_factor(name):
            products = factor @ factor.T if ".lora_A." in name else factor.T @ factor
            distances.append(torch.norm(products - torch.eye(len(products), device=factor.device, dtype=factor.dtype)))
    return torch.stack(distances).mean()


def kept_ranks(model: torch.nn.Module) -> dict[str, list[bool]]:
    """Return, by tensor name, a flag for each singular value: True if it is in use."""
    # A cut singular value is exactly zero, so omitting it changes nothing.
    values = ((name, p) for name, p in model.named_parameters() if f"lora_E.{ADAPTER_NAME}" in name)
    return {name: value.detach().ne(0).view(-1).tolist() for name, value in values}


def _is_factor(name: str) -> bool:
    return name.endswith((f"lora_A.{ADAPTER_NAME}", f"lora_B.{ADAPTER_NAME}"))


def _is_steps_or_share(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 <= value <= 1 or (value > 1 and float(value).is_integer())
