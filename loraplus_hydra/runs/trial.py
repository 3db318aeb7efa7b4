"""Two real steps of a config: their time and memory, before the run is paid for.

    python -m loraplus_hydra.runs.trial CONFIG.yaml

trains two steps on the longest rows in a process of its own, and prints their time and memory as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from loraplus_hydra.io.quiet_libraries import quiet_libraries, quiet_loading
from loraplus_hydra.io.screen import duration
from loraplus_hydra.runs.limits import is_out_of_memory
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.hf_trainer.callbacks import ShowProgress
from loraplus_hydra.training.hf_trainer.checkpoint_callback import CheckpointCallback
from loraplus_hydra.training.hf_trainer.step_memory import longest_rows, packed_to
from loraplus_hydra.training.hf_trainer.temporary import temporary_state
from loraplus_hydra.training.measure import peak_memory_bytes, reset_peak_memory
from loraplus_hydra.training.prepare import prepare

OUT_OF_MEMORY = 75  # exit status of this module
_STEPS = 2


@dataclass(frozen=True)
class Trial:
    """The time and memory of a training step."""

    seconds: float  # of the second step
    steps: int  # of the whole run
    memory_bytes: int  # the peak, as in `result.json`

    def as_text(self) -> str:
        """Return a sentence for the screen."""
        return (
            f"A step took {self.seconds:.3g} s, so {self.steps:,} steps take about "
            f"{duration(self.seconds * self.steps)}, without evaluations. Peak memory: "
            f"{self.memory_bytes / 2**20:,.0f} MiB."
        )


class _Timer(TrainerCallback):
    """Measures each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def try_steps(config: DictConfig, *, longest: bool = False) -> Trial:
    """Load the model and train two steps, whose result is thrown away.

    With `longest`, they are made on the longest rows.
    """
    with temporary_state(), tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config)
        rows = config.trainer.per_device_train_batch_size * config.trainer.gradient_accumulation_steps
        if longest:
            chosen = longest_rows(prepared.examples.train, rows, tokens=packed_to(config))
            prepared = replace(prepared, examples=replace(prepared.examples, train=chosen))
        reset_peak_memory()
        trainer = make_trainer(prepared, Path(folder))
        steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        timer = _Timer()
        trainer.args.max_steps, trainer.args.eval_on_start = _STEPS, False
        trainer.args.eval_strategy, trainer.args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
        trainer.args.load_best_model_at_end = False
        for callback in (CheckpointCallback, ShowProgress):
            trainer.remove_callback(callback)
        trainer.add_callback(timer)
        trainer.train()
        return Trial(timer.seconds[-1], steps, peak_memory_bytes(trainer.args.device))


def main() -> int:
    """Try the config in the file that the command line names. Return the exit status."""
    quiet_libraries()
    quiet_loading()
    try:
        found = try_steps(OmegaConf.load(sys.argv[1]), longest=True)  # type: ignore[arg-type]
    except Exception as error:
        if is_out_of_memory(error):
            return OUT_OF_MEMORY
        raise
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
