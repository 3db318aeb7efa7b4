"""Training of a prepared run with the Hugging Face Trainer."""

from __future__ import annotations

import math
from typing import Any

from transformers import set_seed

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.checkpoints import ResumePoint
from loraplus_hydra.io.result import Result
from loraplus_hydra.training.hf_trainer.callbacks import StopAtStep
from loraplus_hydra.training.hf_trainer.rung import RungReached, StopAtRung
from loraplus_hydra.training.measure import count_parameters, peak_memory_bytes
from loraplus_hydra.training.prepare import Prepared
from loraplus_hydra.training.sampling import answers


def train(
    trainer: Any, job: Prepared, result: Result, point: ResumePoint | None = None, stop_at: float | None = None
) -> None:
    """Evaluate, train and evaluate again. All measurements are written into `result`.

    With `point`, training resumes from the point's checkpoint. With `stop_at`, a share of the steps, it ends at that
    rung with a checkpoint, and RungReached is raised with the losses there. Raises Interrupted after a signal.
    """
    task, examples = job.config.task, job.examples
    result.device = str(trainer.args.device)
    result.trained_parameters, result.total_parameters = count_parameters(trainer.model)
    # A job that stops at a rung may leave there. If it continues, the resumed job makes these answers.
    before = [] if stop_at else answers(trainer.model, trainer.processing_class, examples, task.sample_tokens)
    set_seed(job.config.seed)  # otherwise data order and dropout would depend on the evaluation before
    trainer.add_callback(StopAtRung(trainer, stop_at) if stop_at else StopAtStep())
    try:
        with interrupts.notice("this step is finished, and a checkpoint is written"):
            trained = trainer.train_or_restore(None if point is None else point.folder)
    except RungReached as reached:
        result.metrics = {"eval_loss": reached.rung.loss} if reached.rung.losses else {}
        result.best = best_evaluation(trainer.state.log_history, task.metric, task.greater_is_better)
        result.peak_memory_bytes = peak_memory_bytes(trainer.args.device)
        raise
    finally:
        result.steps = trainer.state.global_step
        result.metrics_before = evaluation_at(trainer.state, 0)
    if result.steps == 0:
        raise UserError(
            "no step was taken, because there are no training rows. All rows may be too long for task.args.max_length, "
            "or the stream may be empty"
        )
    result.train_loss = trained.training_loss
    speed = trainer.throughput.mean
    result.tokens_per_second = None if speed is None else round(speed * trainer.args.world_size, 1)
    result.train_seconds = trained.metrics["train_runtime"] + (0.0 if point is None else point.seconds)
    with trainer.checkpoint_if_stopped():
        interrupts.stop_if_asked()
        result.metrics = evaluation_at(trainer.state, trainer.step_of_model) or trainer.evaluate()
        result.best = best_evaluation(trainer.state.log_history, task.metric, task.greater_is_better)
        if job.other is not None:
            result.metrics |= (change := job.other.change(trainer.model, job.config))
            trainer.log(change)
        result.peak_memory_bytes = peak_memory_bytes(trainer.args.device)
        after = answers(trainer.model, trainer.processing_class, examples, task.sample_tokens)
    result.samples = [
        {"prompt": prompt, "reference": reference, "before": old, "after": new}
        for prompt, reference, old, new in zip(examples.prompts, examples.references, before, after, strict=True)
    ]


def evaluation_at(state: Any, step: int) -> dict[str, float]:
    """Return the metrics of the last evaluation at `step`; empty if there was no evaluation at this step."""
    entries = [entry for entry in state.log_history if entry["step"] == step and "eval_loss" in entry]
    return {key: value for key, value in entries[-1].items() if key != "step"} if entries else {}


def best_evaluation(history: list[dict[str, Any]], metric: str, greater_is_better: bool) -> dict[str, Any]:
    """Return step and value of the best evaluation in a Trainer's log; of equal ones, the earliest."""
    evaluations = [entry for entry in history if not math.isnan(entry.get(metric, math.nan))]  # min and max keep NaN
    if not evaluations:
        return {}
    best = (max if greater_is_better else min)(evaluations, key=lambda entry: entry[metric])
    return {"step": best["step"], "value": best[metric]}
