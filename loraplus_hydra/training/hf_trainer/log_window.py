"""Values that the Trainer has collected since the last line of its log.

The Trainer's checkpoints don't have these values. Without them, a resumed run would log other losses than an
uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplus_hydra.io.checkpoint_state import LogWindow

# Attributes of TRL's trainers: metrics for the next line of the log (ORPO's has another name), and the number of tokens
# seen.
_TRL_WINDOW = ("_metrics", "_stored_metrics", "_total_train_tokens")


def collect_window(trainer: Any) -> LogWindow:
    """Return a Trainer's window. Every process must call this function, because each has its own losses."""
    return LogWindow(
        losses=trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist(),
        since_step=trainer._globalstep_last_logged,
        total=trainer._total_loss_scalar,
        trl=_trl_window(trainer),
    )


def restore_window(trainer: Any, window: LogWindow) -> None:
    """Restore the window that `collect_window` returned."""
    losses = window.losses
    of_this_process = len(losses) == trainer.args.world_size
    trainer._tr_loss += losses[trainer.args.process_index] if of_this_process else sum(losses) / len(losses)
    trainer._globalstep_last_logged = window.since_step
    trainer._total_loss_scalar = window.total
    _restore_trl_window(trainer, window.trl)
    trainer._initial_global_step = 0  # the run's mean loss includes all steps


def _trl_window(trainer: Any) -> dict[str, Any]:
    return {
        name: {key: [float(value) for value in values] for key, values in held["train"].items()}
        if isinstance(held, dict)
        else held
        for name, held in vars(trainer).items()
        if name in _TRL_WINDOW
    }


def _restore_trl_window(trainer: Any, window: Mapping[str, Any]) -> None:
    for name, held in window.items():
        if name not in _TRL_WINDOW or not hasattr(trainer, name):  # the checkpoint is from another Trainer class
            continue
        if isinstance(held, dict):
            getattr(trainer, name)["train"].update(held)
        else:
            setattr(trainer, name, held)
