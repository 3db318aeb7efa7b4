"""Bit-exact resume for Hugging Face Trainers.

The Trainer's checkpoints don't have all state. So a checkpoint also has run_state.json: the values since the last line
of the log, the length of metrics.jsonl, the parameter groups by name, and the schedule. The manifest is written last.
"""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_callback import EarlyStoppingCallback
from transformers.trainer_utils import has_length

from loraplus_hydra.data.fingerprint import RowsRead
from loraplus_hydra.errors import UserError, first_line
from loraplus_hydra.io import interrupts, screen
from loraplus_hydra.io.checkpoint_state import StreamState, run_state
from loraplus_hydra.io.checkpoints import OPTIMIZER, sealed, step_of, unseal
from loraplus_hydra.io.folders import move, remove_folder
from loraplus_hydra.io.interrupts import Interrupted
from loraplus_hydra.io.quiet_libraries import quiet_step_mismatch
from loraplus_hydra.loraplus.schedule_free import RUNNING_VALUES, ScheduleFree
from loraplus_hydra.loraplus.settings import LoraPlus
from loraplus_hydra.models.adapter_files import save_base_config, save_factors
from loraplus_hydra.training.checkpoint_changes import describe_training, differences
from loraplus_hydra.training.hf_trainer.callbacks import stop_requested
from loraplus_hydra.training.hf_trainer.checkpoint_callback import (
    evaluations_without_gain,
    refuse_unfit_best,
    stored_trainer_state,
)
from loraplus_hydra.training.hf_trainer.safe_loads import refuse_code, weights_only_loads
from loraplus_hydra.training.hf_trainer.start_evaluation import evaluate_once
from loraplus_hydra.training.process_state import random_states, set_random_states


class _EvaluationStopped(Interrupted):
    """A signal stopped an evaluation between two of its batches."""


class _TrainingEnded(Exception):
    """Training ended with an evaluation that was repeated after a resume."""


class ResumableMixin:
    """A mixin that saves only the adapter, and restores rates by group name.

    After a resume, `resumed_with` lists the changes in groups and schedule since the checkpoint.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    state: Any
    control: Any
    callback_handler: Any
    loraplus: LoraPlus
    train_dataset: Any
    resumed_with: tuple[str, ...] = ()
    rows_read: RowsRead | None = None  # the streamed training rows that were read
    expected_stream = StreamState()  # the streamed rows that a resumed run must read again
    evaluation_due = False  # True after a signal stopped an evaluation, until the evaluation is repeated
    _epoch_place: tuple[int, int] | None = None  # of a resumed run: finished epochs, and batches of the current one
    _has_noted_rest = False  # True after the note about a stream's last batches
    start_key: str | None = None  # equal for jobs that begin alike, see start_evaluation.py

    def train_or_restore(self, checkpoint: str | None) -> Any:
        """Train from `checkpoint`, or only restore it if it is of the last step.

        Without a checkpoint, training begins at step 0. Raises UserError if the checkpoint is beyond the run's steps.
        """
        # From a checkpoint of the last step, the Trainer would take one step too many, because it checks for the end
        # only after a step.
        if checkpoint is None or not self._is_last(checkpoint) or run_state(Path(checkpoint)).evaluation_due:
            with quiet_step_mismatch(), suppress(_TrainingEnded):
                return self.train(resume_from_checkpoint=checkpoint)  # type: ignore[attr-defined]
        assert checkpoint is not None, "only a resumed run repeats an evaluation"
        return self._restore_last(checkpoint)

    def _is_last(self, checkpoint: str) -> bool:
        """Return True if training ended at a checkpoint: at the last step, or by early stopping."""
        step, planned = run_state(Path(checkpoint)).step, self._planned()[1]
        # Trainer.max_steps was checked before, but the steps of the epochs are known only with the data
        if step > planned:
            raise UserError(
                f"the checkpoint is of step {step}, beyond the {planned} steps of trainer.num_train_epochs="
                f"{self.args.num_train_epochs:g}; set more epochs, or use an earlier checkpoint"
            )
        no_better = evaluations_without_gain(stored_trainer_state(checkpoint))
        return step == planned or any(no_better >= each.early_stopping_patience for each in self.early_stopping())

    def _restore_last(self, checkpoint: str) -> Any:
        """Restore model, state and callbacks as they were after `train()` wrote this last checkpoint."""
        self._load_from_checkpoint(checkpoint)  # type: ignore[attr-defined]
        self.state = stored_trainer_state(checkpoint)
        epochs, steps = self._planned()
        self.state.init_training_references(self, steps, epochs, None)
        # Otherwise the end of training would remove NEFTune's noise, which no layer has
        self.neftune_noise_alpha = None
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        self.callback_handler.on_train_begin(self.args, self.state, self.control)  # restores the log's window
        return self._finalize_training(None, 0, time.time())

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict like the Trainer. First raise Interrupted if a stop was requested."""
        if stop_requested(self.args):
            screen.show("    Stopping the evaluation, which is not recorded")
            raise _EvaluationStopped(interrupts.requested())
        return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate like the Trainer. If a signal stops it, save a checkpoint, so that it can be repeated."""
        before = random_states()  # an evaluation also draws random numbers
        evaluate = functools.partial(super()._evaluate, *args, **kwargs)  # type: ignore[misc]
        try:
            kept = ", and a checkpoint is written" if self.state.global_step else ""
            with interrupts.notice(f"the evaluation ends after this batch{kept}"):
                if self.start_key is None or self.state.global_step:
                    return evaluate()
                return evaluate_once(self, self.start_key, evaluate)
        except _EvaluationStopped:
            if self.state.global_step and not self.evaluation_due:
                set_random_states(before)
                self.evaluation_due = True
                self.save_checkpoint_now()
            raise

    def make_up_evaluation(self, checkpoint: str) -> None:
        """Repeat the evaluation that a signal stopped at the step of `checkpoint`.

        The checkpoint is saved again. Raises _TrainingEnded if this is the end of training.
        """
        screen.show(f"    Repeating the evaluation of step {self.state.global_step}")
        self.evaluation_due = True
        self._load_rng_state(checkpoint)  # type: ignore[attr-defined]
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)  # type: ignore[attr-defined]
        self.evaluation_due = False
        self._replace_checkpoint()
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            raise _TrainingEnded

    def save_checkpoint_now(self) -> None:
        """Save a complete checkpoint of the current step."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _replace_checkpoint(self) -> None:
        """Save the current step's checkpoint again. The earlier one is kept until the new one is complete."""
        # It may be the only checkpoint, and the disk may be full
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        draft = folder / "remade"
        is_first = self.args.process_index == 0
        if is_first:
            remove_folder(draft)  # of a killed process
        self.args.distributed_state.wait_for_everyone()
        self.args.output_dir = str(draft)
        try:
            self.save_checkpoint_now()
            if is_first:
                move(folder / name, draft / "before")
                move(draft / name, folder / name)
        finally:
            self.args.output_dir = str(folder)
            if is_first:
                remove_folder(draft)
        if self.state.best_model_checkpoint is not None:
            self.state.best_model_checkpoint = str(folder / Path(self.state.best_model_checkpoint).name)

    @contextmanager
    def checkpoint_if_stopped(self) -> Iterator[None]:
        """Save a checkpoint of the last step if a signal stops the block, which comes after training."""
        try:
            with interrupts.notice("the current batch is finished, and the last step's checkpoint is written"):
                yield
        except Interrupted:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            # With load_best_model_at_end, the model is the best checkpoint's, not the last step's.
            if not self.args.load_best_model_at_end and folder not in sealed(folder.parent):
                self.save_checkpoint_now()
            raise

    @property
    def step_of_model(self) -> int:
        """The step of the model: the last step, or the best checkpoint's step if that is loaded at the end."""
        # Not `best_global_step`, because there may be no checkpoint at the step of the best evaluation.
        best: str | None = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return step_of(Path(best)) if best is not None else int(self.state.global_step)

    def _planned(self) -> tuple[int, int]:
        """Return the epochs and steps of the run."""
        loader = self.get_train_dataloader()  # type: ignore[attr-defined]
        values = self.set_initial_training_values(self.args, loader)  # type: ignore[attr-defined]
        return int(values[0]), int(values[-1])

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """Return the Trainer's values, such as the steps. A resumed run trains the rest of its epochs."""
        epochs, of_epoch, *others, batches, steps = super().set_initial_training_values(args, dataloader)  # type: ignore[misc]
        if isinstance(args.resume_from_checkpoint, str) and has_length(dataloader):
            # The Trainer assumes that each step so far was one of this run's. With another number of rows or another
            # batch, it would leave out epochs or repeat them.
            state = stored_trainer_state(args.resume_from_checkpoint)
            done, share = divmod(state.epoch, 1)
            at = math.floor(share * batches + 1e-6) // args.gradient_accumulation_steps  # steps in the current epoch
            self._epoch_place = int(done), at * args.gradient_accumulation_steps
            further = state.global_step - (int(done) * of_epoch + at)  # 0 if nothing has changed
            if args.max_steps > 0:
                epochs = math.ceil((steps - further) / of_epoch)
            else:
                steps += further
        return (epochs, of_epoch, *others, batches, steps)

    def early_stopping(self) -> list[EarlyStoppingCallback]:
        """Return the callbacks that stop training early."""
        return [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the finished epochs, and the finished batches of the current epoch, also for streamed rows."""
        epochs, batches = super()._init_training_state(*args, **kwargs)  # type: ignore[misc]
        if self._epoch_place is not None:
            epochs, batches = self._epoch_place[0], 0 if self.args.ignore_data_skip else self._epoch_place[1]
        if self.state.global_step == 0 or has_length(self.train_dataset):
            return epochs, batches
        # The number of steps in a stream's epoch is unknown, so the Trainer assumes that the first epoch has all steps.
        # The fraction in the stored epoch is computed with this assumption.
        epochs = int(self.state.epoch)
        planned = int(stored_trainer_state(self.args.resume_from_checkpoint).max_steps)
        batches = round((self.state.epoch - epochs) * planned * self.args.gradient_accumulation_steps)
        if batches and self.rows_read is not None and not self.args.ignore_data_skip:
            self.rows_read.expected = (self.expected_stream.count, self.expected_stream.digest)
        return epochs, batches

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the batches of a step. At the end of a stream, return none if they don't fill the step."""
        # The Trainer takes no step with them, because it doesn't know the stream's end. Their gradients would be added
        # to the next step's.
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if has_length(self.train_dataset) or not 0 < len(batches) < num_batches:
            return batches, items
        if not self._has_noted_rest:
            screen.show(
                f"    Note: the last {len(batches)} of the stream's batches are left out, because a step has "
                f"{num_batches} (trainer.gradient_accumulation_steps)"
            )
        self._has_noted_rest = True
        return [], None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter, the base's config.json and the tokenizer, without pickled arguments."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_factors(self.model, Path(folder), state_dict=state_dict)
            save_base_config(self.model, Path(folder))  # for `predict`, `evaluate` and `export` from a checkpoint
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because `export` writes the model card. TRL would write a card with each checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save like the Trainer, but into an empty folder, and without removing older checkpoints."""
        # CheckpointCallback removes older checkpoints after this checkpoint is complete.
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            unseal(folder)
        self.args.distributed_state.wait_for_everyone()
        self._use_averaged_weights()
        with _nothing_removed(self.args):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _use_averaged_weights(self) -> None:
        """Put a schedule-free optimizer's averaged weights into the model, until the next training step."""
        # The Trainer does so for evaluations only. A run that is only restored at its last step has no optimizer.
        if self.optimizer is not None and issubclass(self.loraplus.optimizer_class, ScheduleFree):
            self.optimizer.eval()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish like the Trainer, but remove no checkpoint.

        Report a best evaluation whose step has no checkpoint.
        """
        self._use_averaged_weights()
        with _nothing_removed(self.args):
            output = super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        if best is not None and best != self.step_of_model:
            screen.show(
                f"    Note: the best evaluation is of step {best}, which has no checkpoint, so the model is that of "
                f"step {self.step_of_model}. Set trainer.save_steps equal to trainer.eval_steps, so that every "
                "evaluated step has a checkpoint"
            )
        return output

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Prepare like the Trainer. Raises UserError if loading the checkpoint could run code."""
        prepare = super()._prepare_for_training  # type: ignore[misc]
        if resume_from_checkpoint is None:
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        refuse_code(Path(resume_from_checkpoint))
        with weights_only_loads():
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load like the Trainer, but only from a complete checkpoint in this run's own folder."""
        best = Path(self.args.output_dir) / Path(str(self.state.best_model_checkpoint)).name
        refuse_unfit_best(best)
        self.state.best_model_checkpoint = str(best)
        refuse_code(best)
        with weights_only_loads():
            super()._load_best_model()  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Load the weights like the Trainer. Raises UserError if they can't be read."""
        with _restoring(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random states like the Trainer. Raises UserError if they can't be read."""
        with _restoring(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load like the Trainer, then apply the settings of this run's config to every group."""
        if checkpoint is None:
            return
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        # The Trainer would silently keep the new optimizer
        if not sharded and not (Path(checkpoint) / OPTIMIZER).is_file():
            raise UserError(f"{checkpoint} was written with DeepSpeed or FSDP; resume with the same trainer keys")
        stored = run_state(Path(checkpoint))
        groups = {group["name"]: _copied(group) for group in self.optimizer.param_groups}
        schedule = copy.deepcopy(self.lr_scheduler.state_dict())
        with _restoring(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        now = describe_training(self.loraplus, groups, self.state.max_steps)
        self.resumed_with = tuple(differences(stored, replace(stored, **now)))
        if not self.resumed_with:
            return
        for group in self.optimizer.param_groups:
            group.update(groups[group["name"]])
        self.lr_scheduler.load_state_dict(schedule)
        with warnings.catch_warnings():
            # torch warns about the order of steps, because the optimizer took its steps in the earlier process.
            warnings.simplefilter("ignore")
            for _ in range(stored.step):
                self.lr_scheduler.step()


def resumable(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return `trainer_class` with checkpoints from which a run resumes bit for bit."""
    return type(f"Resumable{trainer_class.__name__}", (ResumableMixin, trainer_class), {})


@contextmanager
def _restoring(checkpoint: str | None) -> Iterator[None]:
    """Turn an error inside, where `checkpoint` is read, into a UserError."""
    try:
        yield
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises almost any class for a file that it can't read
        # Only the first sentence, because in the next one torch advises to unpickle the file, whoever wrote it.
        what = f"{type(error).__name__}: {first_line(error).split('. ')[0][:200]}"
        raise UserError(f"{checkpoint} can't be restored ({what}); name an earlier checkpoint, or run anew") from error


@contextmanager
def _nothing_removed(args: Any) -> Iterator[None]:
    """Stop the Trainer from removing checkpoints inside the block.

    Only `rotate` removes checkpoints, and never the newest.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("params", *RUNNING_VALUES)
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in left_out}
