"""LoRA+ for any Hugging Face Trainer, as a mixin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from loraplus_hydra.errors import UserError, first_of
from loraplus_hydra.loraplus.factor_pairs import NEEDS_WHOLE, Pair, PairedOptimizer, factor_pairs
from loraplus_hydra.loraplus.optimizer import build_optimizer
from loraplus_hydra.loraplus.plan import Plan
from loraplus_hydra.loraplus.schedule import build_schedule, falls, highest_rate_step, named_schedule
from loraplus_hydra.loraplus.schedule_free import NOT_CONSTANT, ScheduleFree
from loraplus_hydra.loraplus.settings import LoraPlus
from loraplus_hydra.training.measure import Throughput
from loraplus_hydra.training.reference import exact_reference

_AT_FAULT = (
    "The rate may be too high, or the data or the precision may cause this: try a lower optimizer.lr (with the same "
    "loraplus.ratio), a lower trainer.max_grad_norm, or bf16 instead of fp16"
)
# The fields of the Trainer's arguments that choose an optimizer, and the values of `optim` that mean LoraPlus's default
_OPTIMIZER_FIELDS = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")
_SAME_CLASS = ("adamw_torch", "adamw_torch_fused")
# Parts of parameter names that torch.compile, DDP and FSDP add.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")


class NotFiniteError(UserError):
    """The loss or the gradient of a step is NaN or infinite."""


class LoraPlusMixin:
    """A mixin for LoRA+ training: `class MyTrainer(LoraPlusMixin, SFTTrainer): ...`.

    The constructor also has the arguments `loraplus` (the settings) and `plan` (optional, an existing plan of the
    groups). The mixin also computes a language model's evaluation loss as the mean over tokens, and a classifier's as
    the mean over rows. It stops training at a loss or gradient that isn't finite. Raises UserError if the Trainer is
    also given another optimizer.
    """

    optimizer: Any  # set by the Trainer
    throughput: Throughput | None = None  # measures the tokens per second of training, if set
    lr_scheduler: Any

    def __init__(self, *args: Any, loraplus: LoraPlus, plan: Plan | None = None, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        weights = _trained_weights(model)
        with exact_reference(model):
            super().__init__(*args, **kwargs)
            _restore(model, weights)
        self.loraplus = loraplus
        self._refuse_other_optimizers()
        # Planned before the model is wrapped or sharded, because shards have neither owner nor shape. If the Trainer's
        # constructor has changed the trained tensors, an earlier plan is outdated.
        if plan is None or not _plans_for(plan, self.model):  # type: ignore[attr-defined]
            plan = loraplus.plan(self.model)  # type: ignore[attr-defined]
        self.loraplus_plan = plan
        self._eval_loss_sum = 0.0
        self._eval_weight = 0
        self._batches: tuple[int, int] = (-1, 0)  # a step, and the number of its batches so far

    def _refuse_other_optimizers(self) -> None:
        """Raise UserError if the Trainer was also given another optimizer, or arguments for one."""
        plugin = self.accelerator.state.deepspeed_plugin  # type: ignore[attr-defined]
        given = {
            "optimizers": self.optimizer is not None,
            "optimizer_cls_and_kwargs": getattr(self, "optimizer_cls_and_kwargs", None) is not None,
            "the key optimizer of DeepSpeed's settings": plugin is not None and "optimizer" in plugin.deepspeed_config,
        }
        if others := [name for name, is_given in given.items() if is_given]:
            raise UserError(
                f"the Trainer has {' and '.join(others)}, which would replace LoRA+'s groups or have no effect: leave "
                "it out, and set LoraPlus(optimizer_class=..., optimizer_arguments={...})"
            )
        own = self.args  # type: ignore[attr-defined]
        changed = [
            f"{one.name}={getattr(value, 'value', value)}"
            for one in fields(own)
            if one.name in _OPTIMIZER_FIELDS
            and (value := getattr(own, one.name)) != one.default
            and value not in _SAME_CLASS
        ]
        if changed:
            raise UserError(
                f"the Trainer's arguments have {', '.join(changed)}, which would have no effect: leave it out, and set "
                "LoraPlus(optimizer_class=..., optimizer_arguments={'betas': ..., 'eps': ...})"
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer over the plan's groups."""
        if self.optimizer is None:
            self._refuse_sharding()
            trained = self.model if model is None else model  # type: ignore[attr-defined]
            # Wrappers' prefixes are removed from both names, because a model's own layer may be called `module`.
            bare = {_without_wrappers(name): parameter for name, parameter in trained.named_parameters()}
            own = self._planned_names({name for name, parameter in bare.items() if parameter.requires_grad})
            self.optimizer = build_optimizer(
                self.loraplus.optimizer_class,
                self.loraplus_plan.groups,
                ((own.get(name, name), parameter) for name, parameter in bare.items()),
                self.loraplus.constructor_arguments(),
                pairs=self._pairs(),
            )
        return self.optimizer

    def _planned_names(self, trained: set[str]) -> dict[str, str]:
        """Return the plan's name of each trained tensor, by its name without wrappers' prefixes.

        Makes the plan again if other tensors are trained since. Raises UserError if they are already sharded.
        """
        own = {_without_wrappers(record.name): record.name for record in self.loraplus_plan.records}
        if trained == own.keys():
            return own
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # type: ignore[attr-defined]
            raise UserError(
                "other tensors are trained than when the Trainer was made: "
                f"{first_of(sorted(trained ^ own.keys()), 3)}. DeepSpeed and FSDP need them before: choose the adapter "
                "and freeze or unfreeze tensors first"
            )
        self.loraplus_plan = self.loraplus.plan(self.model)  # type: ignore[attr-defined]
        return {_without_wrappers(record.name): record.name for record in self.loraplus_plan.records}

    def _pairs(self) -> list[Pair] | None:
        return factor_pairs(self.model) if issubclass(self.loraplus.optimizer_class, PairedOptimizer) else None  # type: ignore[attr-defined]

    def _refuse_sharding(self) -> None:
        """Raise UserError for a class that needs whole tensors, if DeepSpeed or FSDP splits them."""
        chosen = self.loraplus.optimizer_class
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        if sharded and issubclass(chosen, (PairedOptimizer, ScheduleFree)):
            raise UserError(f"{chosen.__name__} {NEEDS_WHOLE}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load like the Trainer. Raises UserError if the checkpoint's groups aren't those of the settings."""
        own = self._group_settings() if checkpoint is not None else []
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        # The checkpoint's groups replace the new ones. ResumableMixin, which checks them itself, has put them back.
        changes = [
            f"{group['name']}: " + ("other tensors" if key == "param_names" else f"{key} {stored[key]} -> {value}")
            for group, stored in zip(own, self.optimizer.param_groups, strict=False)
            for key, value in group.items()
            if _comparable(stored.get(key, value)) != _comparable(value)
        ]
        if changes:
            raise UserError(
                f"{checkpoint} has other groups than LoraPlus's settings, and the Trainer would keep its own: "
                f"{first_of(changes, 6)}. Resume with the same settings, or train the saved adapter in a new Trainer"
            )

    def _group_settings(self) -> list[dict[str, Any]]:
        """Return the entries of the optimizer's groups that the settings decide. Others may be running values."""
        chosen = {"name", "param_names", "initial_lr", "weight_decay", *self.loraplus.optimizer_arguments} - {"lr"}
        chosen.update(*(group.settings for group in self.loraplus_plan.groups))
        return [{key: value for key, value in group.items() if key in chosen} for group in self.optimizer.param_groups]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Build the schedule. It keeps the ratio between the groups' rates at every step."""
        if self.lr_scheduler is None:
            schedule, arguments = self._schedule(num_training_steps)
            given: Any = self.optimizer if optimizer is None else optimizer
            schedule_free = issubclass(self.loraplus.optimizer_class, ScheduleFree)
            if schedule_free and falls(schedule, given, num_training_steps=num_training_steps, kwargs=arguments):
                raise UserError(NOT_CONSTANT)
            self.lr_scheduler = build_schedule(schedule, given, num_training_steps=num_training_steps, kwargs=arguments)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def warm_up_steps(self, num_training_steps: int) -> int:
        """Return the number of steps before the schedule's highest rate."""
        schedule, arguments = self._schedule(num_training_steps)
        return highest_rate_step(schedule, self.optimizer, num_training_steps=num_training_steps, kwargs=arguments)

    def _schedule(self, num_training_steps: int) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Return the schedule and its arguments, from the settings or else from the Trainer's arguments."""
        chosen = self.loraplus.schedule
        if chosen is not None:
            return named_schedule(chosen) if isinstance(chosen, str) else chosen, dict(self.loraplus.schedule_arguments)
        own = self.args  # type: ignore[attr-defined]
        arguments = {"num_warmup_steps": own.get_warmup_steps(num_training_steps), **(own.lr_scheduler_kwargs or {})}
        return named_schedule(own.lr_scheduler_type.value), {**arguments, **self.loraplus.schedule_arguments}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's sampler. The order of rows grouped by length depends only on seed and epoch."""
        sampler = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return _OrderOfEpoch(sampler, self.args.seed, lambda: self.state.epoch)  # type: ignore[attr-defined]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward. Raises NotFiniteError, before the step, for a loss that isn't finite."""
        step = self.state.global_step  # type: ignore[attr-defined]
        self._batches = (step, self._batches[1] + 1 if self._batches[0] == step else 1)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss.item()} at {self._place()}{self._beginning(inputs)}. {_AT_FAULT}")
        if self.throughput is not None:
            self.throughput.tokens += count_tokens(inputs)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient's norm. Raise NotFiniteError if it isn't finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        # With float16, the scaler skips such a step instead.
        if self.accelerator.scaler is None and not math.isfinite(norm):  # type: ignore[attr-defined]
            raise NotFiniteError(f"the gradient's norm is {float(norm)} at {self._place()}. {_AT_FAULT}")
        return norm

    def _place(self) -> str:
        step, batch = self._batches
        of = self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        return f"step {step + 1}" + (f", batch {batch} of its {of}" if of > 1 else "")

    def _beginning(self, inputs: Any) -> str:
        """Return the beginning of a batch as text, which helps to find the row."""
        tokens, tokenizer = _tensor(inputs, "input_ids"), self.processing_class  # type: ignore[attr-defined]
        if tokens is None or tokens.ndim != 2 or not hasattr(tokenizer, "decode"):
            return ""
        return f", in the batch that begins {tokenizer.decode(tokens[0, :24], skip_special_tokens=True)!r}"

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Predict like the Trainer, and add the loss of the batch's tokens, or of its rows, to the sum."""
        step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        if step[0] is None or self._weight(inputs) is None:
            return step
        loss, counted, weight = step[0], inputs, 1
        examples = self._examples_not_repeated(inputs)
        if examples is not None:  # predicted again, without the repeated rows that fill the batch
            weight = min(examples, 1)
            counted = {name: _first(value, max(examples, 1)) for name, value in inputs.items()}
            loss = super().prediction_step(model, counted, True, ignore_keys)[0]  # type: ignore[misc]
        weight *= self._weight(counted) or 0
        self._eval_loss_sum += loss.item() * weight if weight else 0.0
        self._eval_weight += weight
        return step

    def _weight(self, inputs: Any) -> int | None:
        """Return the number of a batch's tokens with loss, or of its rows if each row has a label.

        None for other batches, such as pairs of answers, which have two rows for each example.
        """
        labels = _tensor(inputs, "labels")
        if labels is None:
            return None
        if labels.ndim == 2 and getattr(self, "_loss_shifts_labels", False):
            return loss_tokens(inputs)
        has_rows = labels.ndim == 1 or (labels.ndim == 2 and labels.is_floating_point())  # several labels are floats
        return len(labels) if has_rows else None

    def _examples_not_repeated(self, inputs: Any) -> int | None:
        """Return the number of rows in this process's last batch that are not repeated.

        None for any other batch.
        """
        # All processes get last batches of the same size, because accelerate fills them with rows from the beginning.
        state = self.accelerator.gradient_state  # type: ignore[attr-defined]
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:  # type: ignore[attr-defined]
            return None
        size = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
        return min(max(state.remainder - self.args.process_index * size, 0), size)  # type: ignore[attr-defined]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate like the Trainer, but compute the loss as the mean over all tokens, or over all rows."""
        # The Trainer's own loss is a mean of the batches' means. It depends on the batch size, and counts twice the
        # rows that fill the last batches of several processes.
        self._eval_loss_sum, self._eval_weight = 0.0, 0
        arguments = self.args  # type: ignore[attr-defined]
        across, arguments.average_tokens_across_devices = arguments.average_tokens_across_devices, False
        try:
            output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            arguments.average_tokens_across_devices = across
        sums = torch.tensor([self._eval_loss_sum, self._eval_weight], dtype=torch.float64)
        if arguments.world_size > 1:
            sums = self.accelerator.reduce(sums.to(arguments.device), reduction="sum")  # type: ignore[attr-defined]
        if sums[1] > 0:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = float(sums[0] / sums[1])
        return output


class _OrderOfEpoch(Sampler[int]):
    """Rows grouped by length, in an order that a resumed run repeats."""

    # The Trainer draws the order with the global generator, whose state depends on the evaluation before the first
    # step.

    def __init__(self, grouped: LengthGroupedSampler, seed: int, epoch: Callable[[], float]) -> None:
        self.grouped = grouped
        self.seed = seed
        self.epoch = epoch  # number of epochs done, with a fraction for the current epoch

    def __len__(self) -> int:
        return len(self.grouped)

    def __iter__(self) -> Iterator[int]:
        self.grouped.generator = torch.Generator().manual_seed(self.seed + int(self.epoch()))
        return iter(self.grouped)


def with_loraplus(trainer_class: type[Trainer]) -> type[Any]:
    """Return `trainer_class` with LoraPlusMixin as the first base class, if it doesn't have the mixin.

    The class's constructor also has the argument `loraplus`: `with_loraplus(SFTTrainer)(model=model,
    loraplus=LoraPlus(lr=5e-5), ...)`.
    """
    if issubclass(trainer_class, LoraPlusMixin):
        return trainer_class
    return type(f"LoraPlus{trainer_class.__name__}", (LoraPlusMixin, trainer_class), {})


def _plans_for(plan: Plan, model: torch.nn.Module) -> bool:
    """Return True if the plan's tensors are the trained tensors of `model`."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained == {record.name for record in plan.records}


def _trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors, not copies, of a model's trained parameters by name."""
    if not isinstance(model, torch.nn.Module):
        return {}
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def _restore(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Undo TRL's cast of a quantised model's adapter to bfloat16.

    In bfloat16, rounding would lose most updates.
    """
    for name, parameter in model.named_parameters() if weights else ():
        if name in weights and parameter.dtype != weights[name].dtype:
            parameter.data = weights[name].to(parameter.device)


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        while name.startswith(wrapper) or f".{wrapper}" in name:
            name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # betas may be either


def _first(value: Any, examples: int) -> Any:
    return value[:examples] if isinstance(value, torch.Tensor) and value.ndim > 0 else value


def _tensor(inputs: Any, name: str) -> torch.Tensor | None:
    """Return a batch's tensor of this name, or None."""
    # TRL's online trainers, such as GRPOTrainer, pass a list of rows and make the tensors later
    value = inputs.get(name) if isinstance(inputs, Mapping) else None
    return value if isinstance(value, torch.Tensor) else None


def count_tokens(inputs: Any) -> int:
    """Count the tokens of a batch, without padding. 0 for inputs that are not tokens."""
    for name in ("attention_mask", "input_ids"):
        value = _tensor(inputs, name)
        if value is not None and value.ndim == 2:
            return int(value.ne(0).sum()) if name == "attention_mask" else value.numel()
    return 0


def loss_tokens(inputs: Mapping[str, Any]) -> int:
    """Count the tokens with loss in a causal model's batch, without each row's first token."""
    labels = _tensor(inputs, "labels")
    if labels is None or labels.ndim != 2:
        return 0
    return int(labels[:, 1:].ne(-100).sum())
