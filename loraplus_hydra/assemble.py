"""Config + model + examples -> the Trainer, with LoRA+ in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra import screen
from loraplus_hydra.adapter import trainer_callbacks
from loraplus_hydra.build import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.grouping import parse_rules
from loraplus_hydra.metrics_file import MetricsWriter
from loraplus_hydra.paths import CHECKPOINTS, METRICS
from loraplus_hydra.resuming import CheckpointKeeper, resumable
from loraplus_hydra.schema import EARLY_STOPPING
from loraplus_hydra.training import LoraPlus, with_loraplus
from loraplus_hydra.whole_head import score_with_whole_head

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from loraplus_hydra.examples import Examples
    from loraplus_hydra.resume_point import ResumePoint


def make_trainer(
    config: DictConfig,
    folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    point: ResumePoint | None = None,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """The Trainer of `config.task._target_` with the LoRA+ mixin ahead of it, writing into `folder`.

    With `point` its next `train()` goes on from that checkpoint. `tell` is given each line of metrics.jsonl.
    """
    seconds = 0.0 if point is None else point.seconds
    trainer: Any = with_loraplus(resumable(locate(config.task._target_)))(
        model=model,
        args=training_arguments(config, folder, resume_from=None if point is None else point.folder),
        train_dataset=examples.train,
        eval_dataset=examples.eval,
        processing_class=tokenizer,
        loraplus=loraplus_settings(config),
        callbacks=[
            MetricsWriter(folder / METRICS, seconds=seconds, tell=tell),
            screen.progress(),
            *trainer_callbacks(model, config.adapter),
            *_early_stopping(config),
        ],
        **examples.trainer_arguments,
    )
    trainer.add_callback(CheckpointKeeper(trainer, folder / METRICS, seconds=seconds))
    score_with_whole_head(model)
    screen.keep_only_our_progress(trainer)
    _refuse_silent_ddp(trainer)
    return trainer


def _early_stopping(config: DictConfig) -> list[Any]:
    from transformers import EarlyStoppingCallback

    patience = config.trainer.get("early_stopping_patience")
    if patience is None:
        return []
    return [EarlyStoppingCallback(patience, config.trainer.get("early_stopping_threshold", 0.0))]


def _refuse_silent_ddp(trainer: Any) -> None:
    """The Trainer falls back to DDP, or to one process, without a word where FSDP can't be had."""
    from accelerate.utils import DistributedType

    active = trainer.accelerator.distributed_type
    if trainer.args.fsdp and active is not DistributedType.FSDP:
        raise UserError(
            f"trainer.fsdp is set, but FSDP isn't active (what runs is {active.value}): it needs GPUs and several "
            "processes (torchrun --nproc_per_node N -m loraplus_hydra trainer=fsdp2). Use trainer=ddp or default"
        )


def loraplus_settings(config: DictConfig) -> LoraPlus:
    """The `optimizer`, `scheduler` and `loraplus` groups of a config as the mixin takes them."""
    optimizer = _plain(config.optimizer)
    scheduler = _plain(config.scheduler)
    loraplus = _plain(config.loraplus)
    return LoraPlus(
        optimizer_class=locate(optimizer.pop("_target_")),
        lr=optimizer["lr"],  # stays among the arguments too: schedules with a floor measure it against this default
        weight_decay=optimizer.pop("weight_decay", 0.0),
        optimizer_arguments=optimizer,
        rules=parse_rules(loraplus["rules"], where="loraplus.rules"),
        extra_rules=parse_rules(loraplus.get("extra_rules") or {}, where="loraplus.extra_rules"),
        schedule=locate(scheduler.pop("_target_")),
        schedule_arguments=scheduler,
    )


def training_arguments(config: DictConfig, folder: Path, *, resume_from: str | None = None) -> TrainingArguments:
    """The `trainer` group and `task.args` as the task's arguments class; what has another master is set from there.

    `resume_from` is the checkpoint that the config's `trainer.resume_from_checkpoint` has led to.
    """
    arguments = _plain(config.trainer)
    arguments["resume_from_checkpoint"] = resume_from
    for name in EARLY_STOPPING:
        arguments.pop(name, None)
    arguments.update(_plain(config.task.args))
    made: TrainingArguments = locate(config.task.args_class)(
        output_dir=str(folder / CHECKPOINTS),
        seed=config.seed,
        metric_for_best_model=config.task.metric,
        greater_is_better=config.task.greater_is_better,
        report_to="none",
        # Not `evaluate()` ahead of `train()`: it marks the model as prepared, and train() then leaves it as it is, so
        # that under DDP each process would train alone.
        eval_on_start=resume_from is None,
        disable_tqdm=True,  # the screen has its own progress bar
        **arguments,
    )
    return made


def _plain(group: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(group, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
