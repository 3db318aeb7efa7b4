"""Values that we read ourselves: in range, finite, and set at one place only."""

from __future__ import annotations

import re
from typing import Any

from loraplus_hydra.config.schema import value_ranges
from loraplus_hydra.config.types import describe, mismatch
from loraplus_hydra.errors import Problem

# Settings of transformers.TrainingArguments that this config sets elsewhere: one master each.
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
    """Values out of range, and settings given at a place that isn't their master."""
    problems = []
    for key, (annotation, limits) in value_ranges().items():
        present, value = select(plain, key)
        if present and (why := mismatch(value, annotation, limits)):
            problems.append(Problem(key, f"{shown(value)} {why}", f"it must be {describe(annotation, limits)}"))
    for place in ("trainer", "task.args"):
        present, arguments = select(plain, place)
        names = arguments if present and isinstance(arguments, dict) else ()
        problems += [problem for name in names if (problem := set_elsewhere(f"{place}.{name}"))]
    problems += _endless(plain) + _rows_left_out(plain) + _never_evaluated(plain)
    return problems + _never_resumed(plain)


def set_elsewhere(key: str) -> Problem | None:
    """A Problem for a key of `trainer` or `task.args` whose setting has its master at another place of the config."""
    found = re.match(r"((?:trainer|task\.args)\.(\w+))(\.|$)", key)
    if found is None or found[2] not in MASTERS:
        return None
    return Problem(found[1], "is set elsewhere", f"its one master is {MASTERS[found[2]]}")


def _rows_left_out(plain: dict[str, Any]) -> list[Problem]:
    """transformers drops the last batch of an evaluation, too: the metrics would be of some of the rows, or of none."""
    key = "trainer.dataloader_drop_last"
    if select(plain, key)[1] is not True or select(plain, "trainer.per_device_eval_batch_size")[1] == 1:
        return []
    fix = "set it to false, or trainer.per_device_eval_batch_size=1"
    return [Problem(key, "it leaves held-out rows out of the evaluation as well", fix)]


def _never_evaluated(plain: dict[str, Any]) -> list[Problem]:
    """Early stopping goes by evaluations."""
    patience = select(plain, "trainer.early_stopping_patience")[1]
    strategy = select(plain, "trainer.eval_strategy")[1]
    if patience is None or strategy not in ("no", False):
        return []
    what = "training ends early by its evaluations, and trainer.eval_strategy=no has none"
    return [Problem("trainer.early_stopping_patience", what, "trainer.eval_strategy=steps")]


def _never_resumed(plain: dict[str, Any]) -> list[Problem]:
    """The Trainer would go on from a checkpoint without its optimizer's state, with a new optimizer."""
    key = "trainer.save_only_model"
    if select(plain, key)[1] in (None, False):
        return []
    what = "its checkpoints lack the optimizer's state, so no run could go on from them"
    return [Problem(key, what, "leave it out: a checkpoint holds the adapter alone, not the model")]


def _endless(plain: dict[str, Any]) -> list[Problem]:
    """Streamed rows have no end that would end the run."""
    streaming, steps = select(plain, "data.streaming")[1], select(plain, "trainer.max_steps")[1]
    if streaming is not True or steps != -1:
        return []
    return [Problem("trainer.max_steps", "streamed rows have no end that would end the run", "give a number of steps")]


def select(plain: Any, path: str) -> tuple[bool, Any]:
    """Whether there is something at a dotted path of plain mappings, and what."""
    node: Any = plain
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    return f"'{value}'" if isinstance(value, str) else "null" if value is None else str(value)
