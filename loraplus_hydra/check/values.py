"""Check the values of keys with a range, and refuse settings that have another place in the config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from loraplus_hydra.config.schema import value_ranges
from loraplus_hydra.config.types import describe, mismatch
from loraplus_hydra.errors import Problem

# Settings of transformers.TrainingArguments that have another place in this config.
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
    "overwrite_output_dir": "hydra.run.dir (a run never writes over another)",
    "report_to": "metrics.jsonl, which is always written",
    "disable_tqdm": "the terminal: progress is a bar there and lines elsewhere",
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
    """Return values out of range, settings at the wrong place, and values that contradict each other."""
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
    return Problem(found[1], "is set elsewhere", f"its one master is {MASTERS[found[2]]}")


def _contradictions(plain: dict[str, Any]) -> Iterator[Problem]:
    """Yield a Problem for each setting that another one, or the run itself, makes impossible."""

    def value(key: str) -> Any:
        return select(plain, key)[1]

    if value("data.streaming") is True and value("trainer.max_steps") == -1:
        what = "streamed rows have no end that would end the run"
        yield Problem("trainer.max_steps", what, "give a number of steps")
    # transformers drops the last batch of an evaluation, too.
    if value("trainer.dataloader_drop_last") is True and value("trainer.per_device_eval_batch_size") != 1:
        what = "it leaves held-out rows out of the evaluation as well"
        fix = "set it to false, or trainer.per_device_eval_batch_size=1"
        yield Problem("trainer.dataloader_drop_last", what, fix)
    if value("trainer.early_stopping_patience") is not None and value("trainer.eval_strategy") in ("no", False):
        what = "evaluations end training early, and trainer.eval_strategy=no has none"
        yield Problem("trainer.early_stopping_patience", what, "trainer.eval_strategy=steps")
    if value("trainer.save_only_model") not in (None, False):
        what = "its checkpoints lack the optimizer's state, so no run could resume from them"
        fix = "leave it out: a checkpoint holds the adapter alone, not the model"
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
    """Return a value as messages show it."""
    return f"'{value}'" if isinstance(value, str) else "null" if value is None else str(value)
