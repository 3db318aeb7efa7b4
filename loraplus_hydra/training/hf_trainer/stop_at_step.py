"""Ctrl-C and SIGTERM in training: the step at hand is finished, a checkpoint written, and only then the job ends."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy


class StopAtStep(TrainerCallback):
    """Ends training with a checkpoint at the end of the step in which a signal came. To be added last.

    No checkpoint comes between a step and what belongs to the end of its epoch: a resume from it would begin the next
    epoch, or find that training is over, and never log and evaluate that one. So at such a step all waits until then.
    Several processes agree at each step: a signal that reached one of them stops all at the same step.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal's number
        self.training = False  # whether there is a step to finish; while the model is evaluated before the first, no
        self.stopping = False  # whether the step at hand is the one that all processes stop at
        self.in_epoch = False  # whether the end of an epoch is still to come
        self.waiting: set[str] = set()  # what the step has asked for, and gets at the end of the epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_epoch = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            self.asked = _largest_of_all_processes(self.asked, args.device)
        if self.asked:
            self.stopping = control.should_save = True
            # Not the end of training yet, which early stopping may ask for in this step's evaluation.
            control.should_epoch_stop = True
            if args.save_strategy == SaveStrategy.BEST:  # the Trainer would save only after a better evaluation
                args.save_strategy = SaveStrategy.STEPS
        if control.should_training_stop or float(state.epoch).is_integer():
            self._wait(control, "should_log", "should_evaluate", "should_save")
        elif self.stopping:
            self._wait(control, "should_save")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop and self.in_epoch:  # stopped early
            self._wait(control, "should_save")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_epoch = False
        if self.stopping:
            if not (control.should_training_stop or float(state.epoch).is_integer()):
                # The epoch isn't over, and what belongs to its end is done after the resume.
                control.should_log = control.should_evaluate = False
            control.should_training_stop = True
        for name in self.waiting:
            setattr(control, name, True)
        self.waiting.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False

    def _wait(self, control: Any, *names: str) -> None:
        """Take back what `control` asks for of `names`, for the end of the epoch."""
        for name in names:
            if getattr(control, name):
                self.waiting.add(name)
                setattr(control, name, False)


def _largest_of_all_processes(number: int, device: Any) -> int:
    import torch
    from torch import distributed

    told = torch.tensor(number, device=device)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
    return int(told)
