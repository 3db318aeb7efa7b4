"""One way to train and evaluate one case, in a process that `benchmarks.step` starts; prints JSON.

python -m benchmarks.step_worker WAY DEVICE STEPS EVAL_ROWS OVERRIDE ...
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainerCallback, get_linear_schedule_with_warmup, set_seed

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import register, run_of
from loraplus_hydra.io.quiet_libraries import quiet_libraries, quiet_loading
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.lean import adopt
from loraplus_hydra.training.measure import peak_memory_bytes, reset_peak_memory
from loraplus_hydra.training.prepare import prepare

WARM_UP = 4  # steps
Clock = Callable[[], float]
# What a way changes of the case's config; ways that are not here change nothing but `trainer.forward`.
CHANGES = {
    "padding_free": [
        *("+task.args.padding_free=true", "task.args.max_length=null", "model.attention=flash_attention_2")
    ],
    "liger": ["+trainer.use_liger_kernel=true"],
}


class Timer(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(self.clock())


def by_trainer(trainer: Any, clock: Clock) -> list[float]:
    """Train; return when each step ended."""
    timer = Timer(clock)
    trainer.add_callback(timer)
    trainer.args.eval_on_start = False
    trainer.train()
    return timer.ends


def by_hand(trainer: Any, clock: Clock, steps: int) -> list[float]:
    """Train on the Trainer's own batches with PyTorch and PEFT alone; return when each step ended."""
    model, device = trainer.model, trainer.args.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    set_seed(0)
    batches = (batch for loader in itertools.repeat(trainer.get_train_dataloader()) for batch in loader)
    model.train()
    ends = []
    for _ in range(steps):
        batch = {name: value.to(device) for name, value in next(batches).items()}
        loss = model(**batch, use_cache=False).loss if "token_type_ids" not in batch else model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        ends.append(clock())
    return ends


def clock_of(device: str) -> Clock:
    if device == "cpu":
        return time.process_time

    def wait() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wait


def measure(way: str, device: str, steps: int, eval_rows: int, overrides: list[str]) -> dict[str, float]:
    forward = "lean" if way == "lean" else "plain"
    if way == "plain_default_memory":
        adopt.keep_freed_memory = lambda: False  # type: ignore[assignment]
    if way == "plain_cudnn":  # torch's own choice of attention kernels
        adopt.skip_cudnn_attention = lambda: None
    register()
    shared = [*overrides, *CHANGES.get(way, ()), f"trainer.forward={forward}", f"trainer.max_steps={steps}"]
    quick = ["trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.logging_steps=10"]
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        config = run_of(compose("config", overrides=[*shared, *quick, f"trainer.use_cpu={device == 'cpu'}"]))
    clock = clock_of(device)
    messages: list[str] = []
    adopt.screen.show = messages.append  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(prepare(config), Path(folder))
        reset_peak_memory()
        ends = by_hand(trainer, clock, steps) if way == "bare" else by_trainer(trainer, clock)
        if way == "lean" and any("plain" in text for text in messages):
            raise SystemExit("\n".join(messages))  # otherwise plain would be measured under lean's name
        taken = {"step": (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP)}
        taken["memory"] = peak_memory_bytes(trainer.args.device)
        if eval_rows and way != "bare":
            rows = trainer.eval_dataset.select(range(min(eval_rows, len(trainer.eval_dataset))))
            started = clock()
            trainer.evaluate(rows)
            taken["evaluation"] = clock() - started
    return taken


def main() -> None:
    way, device, steps, eval_rows, *overrides = sys.argv[1:]
    quiet_libraries()
    quiet_loading()
    taken = measure(way, device, int(steps), int(eval_rows), overrides)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
