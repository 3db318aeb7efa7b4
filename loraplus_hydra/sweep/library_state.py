"""State that libraries keep for the whole process, reset after each job."""

from __future__ import annotations

import sys
from typing import Any


def reset_libraries() -> None:
    """Reset the process-wide state of each library that has been imported."""
    for name, reset in _RESETS.items():
        if (module := sys.modules.get(name)) is not None:
            reset(module)


def _reset_accelerate(state: Any) -> None:
    # It keeps the first job's device and precision, and accumulates gradients where that one stopped.
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def _reset_bitsandbytes(optimizer: Any) -> None:
    # It keeps overrides by a parameter's id(), which a tensor of the next job may get again.
    optimizer.GlobalOptimManager._instance = None


def _reset_dynamo(dynamo: Any) -> None:
    dynamo.reset()  # compiled code keeps the job's model alive


def _end_wandb_run(wandb: Any) -> None:
    if getattr(wandb, "run", None) is not None:  # the next job would log into it
        wandb.finish()


def _end_mlflow_run(mlflow: Any) -> None:
    if mlflow.active_run() is not None:
        mlflow.end_run()


_RESETS = {
    "accelerate.state": _reset_accelerate,
    "bitsandbytes.optim.optimizer": _reset_bitsandbytes,
    "torch._dynamo": _reset_dynamo,
    "wandb": _end_wandb_run,
    "mlflow": _end_mlflow_run,
}
