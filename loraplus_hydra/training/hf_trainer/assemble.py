"""The Hugging Face Trainer of a prepared run, with LoRA+, checkpoints and metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from omegaconf import DictConfig
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_utils import has_length

from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import NOT_TRAINING_ARGUMENTS
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import processes, screen
from loraplus_hydra.io.checkpoint_state import StreamState
from loraplus_hydra.io.checkpoints import ResumePoint
from loraplus_hydra.io.metrics_log import MetricsLog
from loraplus_hydra.io.run_folder import CHECKPOINTS, METRICS
from loraplus_hydra.loraplus.schedule_free import ScheduleFree
from loraplus_hydra.models.adapter import schedule_of
from loraplus_hydra.models.eva import awaits_directions, take_ranks
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.training.deepspeed_settings import complete_settings
from loraplus_hydra.training.hf_trainer.answer_ends import with_one_end
from loraplus_hydra.training.hf_trainer.average import EMA, OF_RUNGS, AverageCallback, decay_for_rungs, with_average
from loraplus_hydra.training.hf_trainer.callbacks import MetricsCallback, ShowProgress, remove_own_printing
from loraplus_hydra.training.hf_trainer.checkpoint_callback import CheckpointCallback
from loraplus_hydra.training.hf_trainer.eva import start_from_rows
from loraplus_hydra.training.hf_trainer.loraplus_mixin import with_loraplus
from loraplus_hydra.training.hf_trainer.resumable_mixin import resumable
from loraplus_hydra.training.hf_trainer.start_evaluation import start_key
from loraplus_hydra.training.hf_trainer.whole_head import score_with_whole_head
from loraplus_hydra.training.lean.adopt import adopt
from loraplus_hydra.training.prepare import Prepared, plan_groups
from loraplus_hydra.training.progress import ProgressDisplay
from loraplus_hydra.training.utilisation import tokens_at_peak


def make_trainer(
    job: Prepared,
    folder: Path,
    point: ResumePoint | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    stop_at: float | None = None,
) -> Any:
    """Make the Trainer of `task._target_` with the LoRA+ mixin. It writes into `folder`.

    With `point`, the next `train()` resumes from its checkpoint. `report` is called with each line of metrics.jsonl.
    `stop_at` is a rung's share of all steps, or None.
    """
    config, seconds = job.config, 0.0 if point is None else point.seconds
    schedule = schedule_of(type(job.model.active_peft_config))
    metrics = MetricsCallback(MetricsLog(folder / METRICS, seconds=seconds, report=report))
    trainer_class = with_loraplus(resumable(with_one_end(locate(config.task._target_))))
    decay = config.trainer.get("ema")
    trainer: Any = (trainer_class if decay is None else with_average(trainer_class))(
        model=job.model,
        args=training_arguments(config, folder, job.examples, resume_from=None if point is None else point.folder),
        train_dataset=job.examples.train,
        eval_dataset=job.examples.eval,
        processing_class=job.tokenizer,
        loraplus=job.settings,
        plan=job.plan,
        callbacks=[
            metrics,
            ShowProgress(ProgressDisplay(bar=sys.stdout.isatty()), metrics),
            *(schedule.callbacks(job.model, config.adapter) if schedule else []),
            *_early_stopping(config),
        ],
        **job.examples.trainer_arguments,
    )
    if awaits_directions(job.model):
        if point is None or point.checkpoint is None:
            start_from_rows(trainer, job.model, config.seed)
        else:
            take_ranks(job.model, point.checkpoint.folder)
        trainer.loraplus_plan = plan_groups(config, job.model)[1]
    trainer.start_key = start_key(job)
    trainer.throughput = metrics.throughput
    metrics.peak = tokens_at_peak(job.model, trainer.args.device, _autocast(trainer.args))
    if decay is not None:
        trainer.add_callback(AverageCallback(trainer, EMA, lambda _: decay))
    if stop_at and schedule is None and _can_average(trainer):
        trainer.add_callback(AverageCallback(trainer, OF_RUNGS, decay_for_rungs))
    changed = () if point is None else point.changed
    trainer.add_callback(
        CheckpointCallback(
            trainer,
            folder / METRICS,
            seconds=seconds,
            inputs=job.inputs,
            is_other_direction=any(change.startswith("task.greater_is_better:") for change in changed),
        )
    )
    if not trainer.args.dataloader_num_workers:  # the rows that worker processes read are unknown here
        trainer.rows_read = job.examples.rows_read
        trainer.expected_stream = StreamState() if point is None else point.stream
    score_with_whole_head(job.model)
    remove_own_printing(trainer)
    _refuse_other_processes(trainer)
    _report_dropped_rows(trainer, job)
    adopt(trainer, config.trainer.get("forward", "plain"))
    return trainer


def _can_average(trainer: Any) -> bool:
    """Return True if rungs can compare an average of the weights."""
    # It needs whole tensors. A schedule-free optimizer has an average of its own.
    is_split = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return not is_split and not issubclass(trainer.loraplus.optimizer_class, ScheduleFree)


def training_arguments(
    config: DictConfig, folder: Path, examples: Examples, *, resume_from: str | None = None
) -> TrainingArguments:
    """Return the arguments of the task's Trainer from `trainer`, `task.args` and other groups.

    `resume_from` is the checkpoint that `trainer.resume_from_checkpoint` names.
    """
    arguments = plain_of(config.trainer)
    arguments["resume_from_checkpoint"] = resume_from
    for name in NOT_TRAINING_ARGUMENTS:
        arguments.pop(name, None)
    if arguments.get("deepspeed"):
        arguments["deepspeed"] = complete_settings(arguments["deepspeed"])
    arguments.update(plain_of(config.task.args))
    if examples.max_length is not None:
        arguments["max_length"] = examples.max_length
    if processes.world_size() > 1 and not torch.accelerator.is_available():
        arguments["use_cpu"] = True  # otherwise the Trainer searches only for GPUs, and each process trains alone
    made: TrainingArguments = locate(config.task.args_class)(
        output_dir=str(folder / CHECKPOINTS),
        seed=config.seed,
        metric_for_best_model=config.task.metric,
        greater_is_better=config.task.greater_is_better,
        report_to="none",
        # Not `evaluate()` before `train()`: this would mark the model as prepared, so train() would not wrap it in DDP,
        # and each process would train alone.
        eval_on_start=resume_from is None,
        disable_tqdm=True,  # this program shows its own progress bar
        **arguments,
    )
    return made


def _autocast(args: TrainingArguments) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _early_stopping(config: DictConfig) -> list[EarlyStoppingCallback]:
    patience = config.trainer.get("early_stopping_patience")
    if patience is None:
        return []
    return [EarlyStoppingCallback(patience, config.trainer.get("early_stopping_threshold", 0.0))]


def _report_dropped_rows(trainer: Any, job: Prepared) -> None:
    """Report rows that the Trainer dropped. TRL, for example, drops preferences that are too long.

    Raises UserError if no row is left.
    """
    if getattr(trainer.args, "packing", False):  # packing joins several rows into one
        return
    trainer_class = job.config.task._target_.rpartition(".")[2]
    left_out = f"dropped by {trainer_class} (nothing to learn within task.args.max_length)"
    train, held_out = (job.examples.train, trainer.train_dataset), (job.examples.eval, trainer.eval_dataset)
    for split, (given, kept) in (("train", train), ("eval", held_out)):
        if not (has_length(given) and has_length(kept)) or len(kept) >= len(given):
            continue
        if len(kept) == 0:
            raise UserError(f"data.{split}: all {len(given):,} rows are {left_out}; increase it")
        screen.show(f"    Note: {len(given) - len(kept):,} of {len(given):,} {split} rows are {left_out}")


def _refuse_other_processes(trainer: Any) -> None:
    """Raise UserError if the Trainer doesn't use all processes, or not FSDP although it is set."""
    active = trainer.accelerator.distributed_type
    if trainer.args.fsdp and active is not DistributedType.FSDP:  # the Trainer silently uses DDP instead
        raise UserError(
            f"trainer.fsdp is set, but FSDP is not active ({active.value} is used): FSDP needs GPUs and several "
            "processes (torchrun --nproc_per_node N -m loraplus_hydra trainer=fsdp2). Use trainer=ddp or default"
        )
    started, used = processes.world_size(), trainer.args.world_size
    if started != used:
        raise UserError(
            f"{started} processes were started, but the Trainer uses {used}, so each process would train alone in the "
            "same folder. Start one process, or give each process its own device (on CPUs: trainer.use_cpu=true)"
        )
