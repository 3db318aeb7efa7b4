"""What the Trainer's own checkpoints lack for a run that goes on to the same numbers: a mixin and its callback.

Beside the Trainer's files a checkpoint holds run_state.json: the part of the logging window that isn't logged yet, the
length of metrics.jsonl, the parameter groups by name and the schedule. The manifest is written after everything else.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import EarlyStoppingCallback

from loraplus_hydra.errors import UserError
from loraplus_hydra.io import screen
from loraplus_hydra.io.checkpoint_state import STATE
from loraplus_hydra.io.checkpoints import OPTIMIZER, open_checkpoint, rotate, seal, step_of, unseal
from loraplus_hydra.io.files import replace_folder, unfinished, write_text
from loraplus_hydra.io.quiet_libraries import quiet_step_mismatch
from loraplus_hydra.io.read import read_json
from loraplus_hydra.training.checkpoint_changes import described, differences

# Where TRL's trainers keep the metrics that aren't logged yet (ORPO's under a name of its own), and the tokens seen.
_TRL_WINDOW = ("_metrics", "_stored_metrics", "_total_train_tokens")


class ResumableMixin:
    """Put ahead of a Trainer class: its checkpoints hold the adapter alone, and rates are restored by group name.

    `resumed_with` says, after a resume, what of the groups and the schedule differs from the checkpoint's.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    state: Any
    control: Any
    callback_handler: Any
    resumed_with: tuple[str, ...] = ()

    def train_or_restore(self, checkpoint: str | None) -> Any:
        """Train, from `checkpoint` on if there is one; when no step comes after it, only bring the model there.

        The Trainer itself would take one step more: it looks for the end behind a step. Raises UserError when the
        checkpoint is beyond the run's steps.
        """
        if checkpoint is None or not self._is_last(checkpoint):
            with quiet_step_mismatch():
                return self.train(resume_from_checkpoint=checkpoint)  # type: ignore[attr-defined]
        return self._restore_last(checkpoint)

    def _is_last(self, checkpoint: str) -> bool:
        """Whether training ended at a checkpoint: with the last step, or earlier, since evaluations got no better."""
        step, planned = _stored(checkpoint)["step"], self._planned()[1]
        if step > planned:  # trainer.max_steps is looked at before the data are loaded
            raise UserError(
                f"the checkpoint is of step {step}, beyond the {planned} steps of trainer.num_train_epochs="
                f"{self.args.num_train_epochs:g}; give more epochs, or an earlier checkpoint"
            )
        no_better = _evaluations_no_better(_trainer_state(checkpoint))
        return step == planned or any(no_better >= each.early_stopping_patience for each in self._early_stopping())

    def _restore_last(self, checkpoint: str) -> Any:
        """Model, state and callbacks as `train()` leaves them, from the checkpoint that it ended at."""
        self._load_from_checkpoint(checkpoint)  # type: ignore[attr-defined]
        self.state = _trainer_state(checkpoint)
        epochs, steps = self._planned()
        self.state.init_training_references(self, steps, epochs, None)
        self.neftune_noise_alpha = None  # its noise is in no layer that the end would take it out of
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        self.callback_handler.on_train_begin(self.args, self.state, self.control)  # brings the log's window back
        return self._finalize_training(None, 0, time.time())

    @property
    def step_of_model(self) -> int:
        """The step that the model is of: the last, or that of the best checkpoint where one is loaded at the end.

        The best evaluation may be of another step (`best_global_step`), at which no checkpoint was written.
        """
        best: str | None = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return step_of(Path(best)) if best is not None else int(self.state.global_step)

    def _planned(self) -> tuple[int, int]:
        """Epochs and steps of the run."""
        loader = self.get_train_dataloader()  # type: ignore[attr-defined]
        values = self.set_initial_training_values(self.args, loader)  # type: ignore[attr-defined]
        return int(values[0]), int(values[-1])

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter and the tokenizer, without pickled arguments."""
        from peft import PeftModel

        from loraplus_hydra.models.adapter_files import save_factors

        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_factors(self.model, Path(folder), state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card, which TRL writes with each checkpoint: `export` writes one that says what was trained."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's, into an empty folder; older ones are removed by the callback, once this one counts."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            unseal(folder)
        self.args.distributed_state.wait_for_everyone()
        with _nothing_removed(self.args):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but no checkpoint is removed, and it is told when the best step has none."""
        with _nothing_removed(self.args):
            output = super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        if best is not None and best != self.step_of_model:
            screen.show(
                f"    Note: the best evaluation is of step {best}, which has no checkpoint, so the model is that of "
                f"step {self.step_of_model}. With trainer.save_steps equal to trainer.eval_steps, each has one"
            )
        return output

    def _load_best_model(self) -> None:
        """As the Trainer's, but only from a whole checkpoint of this run's own folder."""
        best = Path(self.args.output_dir) / Path(str(self.state.best_model_checkpoint)).name
        _refuse_unfit_best(best)
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, and then every group has the settings of this run's config, not those of the checkpoint."""
        if checkpoint is None:
            return
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        if not sharded and not (Path(checkpoint) / OPTIMIZER).is_file():  # else the Trainer would keep the new one
            raise UserError(f"{checkpoint} was written under DeepSpeed or FSDP; go on with the trainer keys of then")
        stored = _stored(checkpoint)
        groups = {group["name"]: _copied(group) for group in self.optimizer.param_groups}
        schedule = copy.deepcopy(self.lr_scheduler.state_dict())
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        self.resumed_with = tuple(differences(stored, described(self, groups)))
        if not self.resumed_with:
            return
        for group in self.optimizer.param_groups:
            group.update(groups[group["name"]])
        self.lr_scheduler.load_state_dict(schedule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the order of steps: the optimizer's were taken before
            for _ in range(stored["step"]):
                self.lr_scheduler.step()


def resumable(trainer_class: type[Trainer]) -> type[Trainer]:
    """`trainer_class` with checkpoints that a run can go on from."""
    return type(f"Resumable{trainer_class.__name__}", (ResumableMixin, trainer_class), {})


class CheckpointKeeper(TrainerCallback):
    """Finishes each checkpoint, and brings the Trainer back to where it was. Added last: it seals what others write."""

    def __init__(self, trainer: Any, metrics: Path, *, seconds: float = 0.0) -> None:
        self.trainer = trainer
        self.metrics = metrics
        self.started = time.perf_counter() - seconds

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        losses = _of_all_processes(self.trainer, self.trainer._tr_loss)
        if state.is_world_process_zero:
            told = {
                "step": state.global_step,
                "seconds": round(time.perf_counter() - self.started, 3),
                "metrics_bytes": self.metrics.stat().st_size if self.metrics.is_file() else 0,
                "window": {
                    "losses": losses,
                    "since_step": self.trainer._globalstep_last_logged,
                    "total": self.trainer._total_loss_scalar,
                    "trl": _trl_window(self.trainer),
                },
                **described(self.trainer, {group["name"]: group for group in self.trainer.optimizer.param_groups}),
            }
            write_text(folder / STATE, json.dumps(told, indent=2) + "\n")
        args.distributed_state.wait_for_everyone()  # each process writes its own random state into the folder
        if state.is_world_process_zero:
            seal(folder)
            rotate(Path(args.output_dir), args.save_total_limit, state.best_model_checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not isinstance(args.resume_from_checkpoint, str):
            return
        for change in self.trainer.resumed_with:
            screen.show(f"    Changed from here on: {change}")
        state.best_model_checkpoint = own_best(args.resume_from_checkpoint, args)
        # Steps that are given as a share of all are a share of this run's steps, not of the checkpoint's.
        state.compute_steps(args, state.max_steps)
        window = _stored(args.resume_from_checkpoint)["window"]
        losses = window["losses"]
        mine = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
        self.trainer._tr_loss += mine
        self.trainer._globalstep_last_logged = window["since_step"]
        self.trainer._total_loss_scalar = window["total"]
        _restore_trl_window(self.trainer, window["trl"])
        self.trainer._initial_global_step = 0  # the mean loss of the run is over all its steps
        for callback in self.trainer._early_stopping():
            callback.early_stopping_patience_counter = _evaluations_no_better(state)


def own_best(checkpoint: str, args: Any) -> str | None:
    """The best checkpoint that `checkpoint` knows of, as one of this run's own folder; None when it knows of none.

    It lies beside `checkpoint`, whatever path is stored: the run may have been moved. One of another run is copied,
    since that run may remove it. Raises UserError when it is to be loaded at the end and isn't whole.
    """
    stored = _trainer_state(checkpoint).best_model_checkpoint
    if stored is None:
        return None
    best = Path(checkpoint).parent / Path(str(stored)).name
    own = Path(args.output_dir) / best.name
    if not args.load_best_model_at_end:
        return str(own) if own.is_dir() else None
    _refuse_unfit_best(best)
    if args.process_index == 0 and best.resolve() != own.resolve():
        draft = unfinished(own)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(best, draft)
        replace_folder(draft, own)
    args.distributed_state.wait_for_everyone()
    return str(own)


def _refuse_unfit_best(folder: Path) -> None:
    """Raise UserError unless `folder` is a whole checkpoint, from which nothing but safetensors is read."""
    try:
        if step_of(folder) < 0:
            raise ValueError("that isn't the name of a checkpoint")
        open_checkpoint(folder)
    except ValueError as why:
        raise UserError(
            f"the best checkpoint, {folder}, can't be loaded at the end: {why}. With "
            "trainer.load_best_model_at_end=false the run goes on to the adapter of its last step"
        ) from None


@contextmanager
def _nothing_removed(args: Any) -> Iterator[None]:
    """Inside, the Trainer removes no checkpoint: that is left to `rotate`, which never removes the newest."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield
    finally:
        args.save_total_limit = limit


def _stored(checkpoint: str) -> dict[str, Any]:
    """Return a checkpoint's run_state.json."""
    state: dict[str, Any] = read_json(Path(checkpoint) / STATE)
    return state


def _trainer_state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def _evaluations_no_better(state: TrainerState) -> int:
    """How many evaluations in a row were no better, as early stopping has counted them up to a checkpoint."""
    kept = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    return int(kept.get("early_stopping_patience_counter", 0))


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _trl_window(trainer: Any) -> dict[str, Any]:
    """What TRL's trainers have gathered for the next line of the log, and the tokens they count over the whole run."""
    return {
        name: {key: [float(value) for value in values] for key, values in held["train"].items()}
        if isinstance(held, dict)
        else held
        for name, held in vars(trainer).items()
        if name in _TRL_WINDOW
    }


def _restore_trl_window(trainer: Any, window: Mapping[str, Any]) -> None:
    for name, held in window.items():
        if name not in _TRL_WINDOW or not hasattr(trainer, name):  # another trainer's, or none that a run writes
            continue
        if isinstance(held, dict):
            getattr(trainer, name)["train"].update(held)
        else:
            setattr(trainer, name, held)


def _of_all_processes(trainer: Any, value: Any) -> list[float]:
    if trainer.args.world_size == 1:
        return [float(value)]
    gathered: list[float] = trainer.accelerator.gather(value.reshape(1)).tolist()
    return gathered
