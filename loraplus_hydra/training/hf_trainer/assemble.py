"""Config + model + examples -> the Trainer, with LoRA+ in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraplus_hydra.training.prepare import _plain, loraplus_settings

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from peft import PeftModel

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from loraplus_hydra.config.schema import EARLY_STOPPING
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import UserError
from loraplus_hydra.io.run_folder import CHECKPOINTS, METRICS
from loraplus_hydra.training.hf_trainer import progress_callback
from loraplus_hydra.training.hf_trainer.loraplus_mixin import with_loraplus
from loraplus_hydra.training.hf_trainer.metrics_callback import MetricsWriter
from loraplus_hydra.training.hf_trainer.resumable_mixin import CheckpointKeeper, resumable
from loraplus_hydra.training.hf_trainer.whole_head import score_with_whole_head

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from loraplus_hydra.io.checkpoints import ResumePoint
    from loraplus_hydra.tasks.examples import Examples


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
            progress_callback.progress(),
            *trainer_callbacks(model, config.adapter),
            *_early_stopping(config),
        ],
        **examples.trainer_arguments,
    )
    trainer.add_callback(CheckpointKeeper(trainer, folder / METRICS, seconds=seconds))
    score_with_whole_head(model)
    progress_callback.keep_only_our_progress(trainer)
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


def trainer_callbacks(model: PeftModel, adapter: DictConfig | Mapping[str, Any]) -> list[Any]:
    """What a Trainer must call for this adapter."""
    from peft import AdaLoraConfig

    from loraplus_hydra.models.adalora import AdaLoraCallback

    if not isinstance(model.active_peft_config, AdaLoraConfig):
        return []
    return [AdaLoraCallback(model, tinit=adapter.get("tinit", 0), tfinal=adapter.get("tfinal", 0))]
