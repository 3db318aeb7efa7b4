"""Check the values of keys with a range, and refuse settings that have another place in the config."""

from __future__ import annotations

import re
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
    rules = (_streaming_without_max_steps, _drops_evaluation_rows, _stops_early_without_evaluation, _saves_only_model)
    return problems + [problem for rule in rules if (problem := rule(plain))]


def set_elsewhere(key: str) -> Problem | None:
    """Return a Problem for a key of `trainer` or `task.args` that is set in another group."""
    found = re.match(r"((?:trainer|task\.args)\.(\w+))(\.|$)", key)
    if found is None or found[2] not in MASTERS:
        return None
    return Problem(found[1], "is set elsewhere", f"its one master is {MASTERS[found[2]]}")


def _streaming_without_max_steps(plain: dict[str, Any]) -> Problem | None:
    if select(plain, "data.streaming")[1] is not True or select(plain, "trainer.max_steps")[1] != -1:
        return None
    return Problem("trainer.max_steps", "streamed rows have no end that would end the run", "give a number of steps")


def _drops_evaluation_rows(plain: dict[str, Any]) -> Problem | None:
    key = "trainer.dataloader_drop_last"
    # transformers drops the last batch of an evaluation, too.
    if select(plain, key)[1] is not True or select(plain, "trainer.per_device_eval_batch_size")[1] == 1:
        return None
    fix = "set it to false, or trainer.per_device_eval_batch_size=1"
    return Problem(key, "it leaves held-out rows out of the evaluation as well", fix)


def _stops_early_without_evaluation(plain: dict[str, Any]) -> Problem | None:
    key = "trainer.early_stopping_patience"
    if select(plain, key)[1] is None or select(plain, "trainer.eval_strategy")[1] not in ("no", False):
        return None
    what = "evaluations end training early, and trainer.eval_strategy=no has none"
    return Problem(key, what, "trainer.eval_strategy=steps")


def _saves_only_model(plain: dict[str, Any]) -> Problem | None:
    key = "trainer.save_only_model"
    if select(plain, key)[1] in (None, False):
        return None
    what = "its checkpoints lack the optimizer's state, so no run could resume from them"
    return Problem(key, what, "leave it out: a checkpoint holds the adapter alone, not the model")


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
