"""A callback that completes the Trainer's checkpoints, and restores the Trainer from them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import screen
from loraplus_hydra.io.checkpoint_state import RunState, StoredTrainerState, StreamState, run_state, write_run_state
from loraplus_hydra.io.checkpoints import open_checkpoint, rotate, seal, step_of
from loraplus_hydra.io.folders import copy_files, replaced_folder
from loraplus_hydra.training.checkpoint_changes import describe_training
from loraplus_hydra.training.hf_trainer.log_window import collect_window, restore_window


class CheckpointCallback(TrainerCallback):
    """Adds run_state.json and the manifest to each checkpoint, and restores the Trainer from them.

    Add this callback after all callbacks that write into a checkpoint, because the manifest lists every file.
    """

    def __init__(
        self,
        trainer: Any,
        metrics: Path,
        *,
        seconds: float = 0.0,
        inputs: Mapping[str, str],
        is_other_direction: bool = False,
    ) -> None:
        self.trainer = trainer
        self.is_other_direction = is_other_direction  # task.greater_is_better has changed since the checkpoint
        self.inputs = dict(inputs)
        self.metrics = metrics
        self.started = time.perf_counter() - seconds

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        window, read = collect_window(self.trainer), self.trainer.rows_read
        if state.is_world_process_zero:
            groups = {group["name"]: group for group in self.trainer.optimizer.param_groups}
            write_run_state(
                folder,
                RunState(
                    step=state.global_step,
                    seconds=round(time.perf_counter() - self.started, 3),
                    metrics_bytes=self.metrics.stat().st_size if self.metrics.is_file() else 0,
                    window=window,
                    evaluation_due=self.trainer.evaluation_due,
                    inputs=self.inputs,
                    stream=StreamState() if read is None else StreamState(read.count, read.digest),
                    **describe_training(self.trainer.loraplus, groups, state.max_steps),
                ),
            )
        args.distributed_state.wait_for_everyone()  # each process writes its own random state into the folder
        if state.is_world_process_zero:
            seal(folder)
            rotate(Path(args.output_dir), args.save_total_limit, state.best_model_checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not isinstance(args.resume_from_checkpoint, str):
            return
        for change in self.trainer.resumed_with:
            screen.show(f"    Changed from this step on: {change}")
        stored = run_state(Path(args.resume_from_checkpoint))
        if self._forget_other_evaluations(args, state, stored):
            screen.show(
                "    The evaluation has other rows or another metric from this step on, so the best is found anew"
            )
        else:
            state.best_model_checkpoint = own_best(args.resume_from_checkpoint, args)
        # An interval given as a share of all steps is a share of this run's steps, not of the checkpoint's.
        state.compute_steps(args, state.max_steps)
        restore_window(self.trainer, stored.window)
        for callback in self.trainer.early_stopping():
            callback.early_stopping_patience_counter = evaluations_without_gain(state)
            # The Trainer writes each counter into an entry of the checkpoint's, which has none of a new callback
            state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        if stored.evaluation_due:
            self.trainer.make_up_evaluation(args.resume_from_checkpoint)

    def _forget_other_evaluations(self, args: Any, state: Any, stored: RunState) -> bool:
        """Forget the best evaluation, and return True, if later evaluations can't be compared with it."""
        then, now = stored.inputs.get("data.eval"), self.inputs.get("data.eval")
        has_other_rows = bool(then and now and then != now)
        best, metric = state.best_metric, args.metric_for_best_model
        has_other_metric = best is not None and all(entry.get(metric) != best for entry in state.log_history)
        if not (has_other_rows or has_other_metric or self.is_other_direction):
            return False
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        state.stateful_callbacks.pop("EarlyStoppingCallback", None)
        if has_other_rows:  # otherwise they would be this run's results
            state.log_history = [line for line in state.log_history if not any(key.startswith("eval_") for key in line)]
        return True


def own_best(checkpoint: str, args: Any) -> str | None:
    """Return the path, in this run's folder, of the best checkpoint that `checkpoint` names, or None.

    Another run's best checkpoint is copied, because that run may remove it. Raises UserError if it must be loaded at
    the end but is incomplete.
    """
    stored = stored_trainer_state(checkpoint).best_model_checkpoint
    if stored is None:
        return None
    # It is in the same folder as `checkpoint`. The stored path may be wrong, because the run may have been moved.
    best = Path(checkpoint).parent / Path(str(stored)).name
    own = Path(args.output_dir) / best.name
    if not args.load_best_model_at_end:
        return str(own) if own.is_dir() else None
    refuse_unfit_best(best)
    if args.process_index == 0 and best.resolve() != own.resolve():
        with replaced_folder(own) as draft:
            copy_files(best, draft)
    args.distributed_state.wait_for_everyone()
    return str(own)


def refuse_unfit_best(folder: Path) -> None:
    """Raise UserError unless `folder` is a complete checkpoint whose weights are safetensors."""
    try:
        if step_of(folder) < 0:
            raise ValueError("its name is not a checkpoint's name")
        open_checkpoint(folder)
    except ValueError as why:
        raise UserError(
            f"the best checkpoint, {folder}, can't be loaded at the end: {why}. With "
            "trainer.load_best_model_at_end=false the run can resume, and ends with the adapter of its last step"
        ) from None


def stored_trainer_state(checkpoint: str) -> TrainerState:
    """Return the Trainer's state in a checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def evaluations_without_gain(state: TrainerState | StoredTrainerState) -> int:
    """Return the number of successive evaluations without a gain that early stopping has counted."""
    kept = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    return int(kept.get("early_stopping_patience_counter", 0))
