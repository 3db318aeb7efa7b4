"""Checks of values against their ranges, and of settings that have another key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from loraplus_hydra.config.schema import value_ranges
from loraplus_hydra.config.types import describe, mismatch
from loraplus_hydra.errors import Problem

_NO_KEY = "no key: "
# Settings of transformers.TrainingArguments that have another key in this config -> that key.
MASTERS: dict[str, str] = {
    "learning_rate": "optimizer.lr",
    "optim": "the optimizer group (optimizer=adamw8bit)",
    "optim_args": "the optimizer group's own keys",
    "optim_target_modules": "adapter.target_modules",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "adafactor": "the optimizer group (optimizer=adafactor)",
    "lr_scheduler_type": "the scheduler group (scheduler=cosine)",
    "lr_scheduler_kwargs": "the scheduler group's own keys",
    "warmup_ratio": "scheduler.warmup_ratio",
    "warmup_steps": "scheduler.num_warmup_steps",
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "hydra.run.dir",
    "logging_dir": "hydra.run.dir",
    "run_name": "hydra.run.dir",
    "project": "hydra.run.dir",
    "overwrite_output_dir": "hydra.run.dir (a run never overwrites another)",
    "report_to": "metrics.jsonl, which is always written",
    "disable_tqdm": "the terminal: progress is a bar on a terminal, otherwise lines",
    "metric_for_best_model": "task.metric",
    "greater_is_better": "task.greater_is_better",
    "model_init_kwargs": "the model group",
    "eval_on_start": "no key: a run always evaluates before and after",
    "do_train": "the command: a run trains",
    "do_eval": "trainer.eval_strategy",
    "do_predict": "the command",
    "gradient_checkpointing": "trainer.activation_checkpointing, its name since transformers 5.23",
    "push_to_hub": "no key: publish the adapter/ folder yourself",
}


def value_problems(plain: dict[str, Any]) -> list[Problem]:
    """Return Problems for values out of range, settings at wrong keys, and contradictions."""
    problems = []
    for key, (annotation, limits) in value_ranges().items():
        present, value = select(plain, key)
        if present and (why := mismatch(value, annotation, limits)):
            problems.append(Problem(key, f"{shown(value)} {why}", f"it must be {describe(annotation, limits)}"))
    for place in ("trainer", "task.args"):
        arguments = select(plain, place)[1] or {}
        problems += [problem for name in arguments if (problem := set_elsewhere(f"{place}.{name}"))]
    return [*problems, *_contradictions(plain)]


def set_elsewhere(key: str) -> Problem | None:
    """Return a Problem for a key of `trainer` or `task.args` that is set in another group."""
    found = re.match(r"((?:trainer|task\.args)\.(\w+))(\.|$)", key)
    if found is None or found[2] not in MASTERS:
        return None
    master = MASTERS[found[2]]
    if master.startswith(_NO_KEY):
        return Problem(found[1], "can't be set here", master.removeprefix(_NO_KEY))
    return Problem(found[1], "can't be set here", f"it is set by {master}")


def _contradictions(plain: dict[str, Any]) -> Iterator[Problem]:
    """Yield a Problem for each setting that contradicts another setting or the run."""

    def value(key: str) -> Any:
        return select(plain, key)[1]

    if value("data.streaming") is True and value("trainer.max_steps") == -1:
        what = "the number of streamed rows is unknown, so the run would not end"
        yield Problem("trainer.max_steps", what, "set a number of steps")
    # transformers also drops the last batch of an evaluation.
    if value("trainer.dataloader_drop_last") is True and value("trainer.per_device_eval_batch_size") != 1:
        what = "it also omits rows from the evaluation"
        fix = "set it to false, or trainer.per_device_eval_batch_size=1"
        yield Problem("trainer.dataloader_drop_last", what, fix)
    if value("trainer.early_stopping_patience") is not None and value("trainer.eval_strategy") in ("no", False):
        what = "early stopping needs evaluations, but trainer.eval_strategy=no has none"
        yield Problem("trainer.early_stopping_patience", what, "trainer.eval_strategy=steps")
    if value("trainer.ema") is not None and (value("trainer.fsdp") or value("trainer.deepspeed")):
        what = "the average needs whole tensors, which DeepSpeed and FSDP split"
        yield Problem("trainer.ema", what, "set it to null, or use trainer=default or ddp")
    if value("task.args.packing") is True and select(plain, "task.args.max_length") == (True, None):
        yield Problem("task.args.max_length", "packing fills rows of this length", "set a number of tokens")
    if value("trainer.save_only_model") not in (None, False):
        what = "its checkpoints have no optimizer state, so no run could resume from them"
        fix = "remove it: a checkpoint has only the adapter, not the model"
        yield Problem("trainer.save_only_model", what, fix)


def select(plain: Any, path: str) -> tuple[bool, Any]:
    """Return True and the value at a dotted path of plain mappings, or False and None."""
    node: Any = plain
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node


def shown(value: Any) -> str:
    """Return a value's text for messages."""
    return f"'{value}'" if isinstance(value, str) else "null" if value is None else str(value)
