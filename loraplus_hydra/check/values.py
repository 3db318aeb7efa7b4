"""Values that we read ourselves: in range, finite, and set at one place only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraplus_hydra.errors import Problem


@dataclass(frozen=True)
class Range:
    """What a value may be: `holds` says whether, `words` what would be right, `kind` what it is in or out of range."""

    words: str
    holds: Callable[[Any], bool]
    nullable: bool = False
    kind: str | None = None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# A value that is none of its kind is told so, and not that it is out of range.
NUMBER, WHOLE_NUMBER, LIST = "a number", "a whole number", "a list"
_IS_OF: dict[str, Callable[[Any], bool]] = {
    NUMBER: lambda x: isinstance(x, (int, float)) and not isinstance(x, bool),
    WHOLE_NUMBER: _whole,
    LIST: lambda x: isinstance(x, list),
}

POSITIVE = Range("a finite number above 0", lambda x: _number(x) and x > 0, kind=NUMBER)
NOT_NEGATIVE = Range("a finite number from 0 on", lambda x: _number(x) and x >= 0, kind=NUMBER)
COUNT = Range("a whole number from 1 on", lambda x: _whole(x) and x >= 1, kind=WHOLE_NUMBER)
COUNT_OR_NULL = Range("a whole number from 1 on, or null", COUNT.holds, nullable=True, kind=WHOLE_NUMBER)
WHOLE = Range("a whole number from 0 on", lambda x: _whole(x) and x >= 0, kind=WHOLE_NUMBER)
WHOLE_OR_NULL = Range("a whole number from 0 on, or null", WHOLE.holds, nullable=True, kind=WHOLE_NUMBER)
SHARE = Range("a number from 0 to 1", lambda x: _number(x) and 0 <= x <= 1, kind=NUMBER)
PROPER_SHARE = Range("a number above 0 and below 1", lambda x: _number(x) and 0 < x < 1, kind=NUMBER)
DROPOUT = Range("a number from 0 to below 1", lambda x: _number(x) and 0 <= x < 1, kind=NUMBER)
EVERY = Range(
    "a whole number of steps, or a share of them between 0 and 1",
    lambda x: COUNT.holds(x) or PROPER_SHARE.holds(x),
    kind=NUMBER,
)
DTYPE = Range("auto, float32, bfloat16 or float16", lambda x: x in ("auto", "float32", "bfloat16", "float16"))
BETAS = Range(
    "two or more numbers from 0 to below 1",
    lambda x: isinstance(x, list) and len(x) >= 2 and all(DROPOUT.holds(beta) for beta in x),
    kind=LIST,
)

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")  # transformers' names

RANGES: dict[str, Range] = {
    "seed": Range(  # numpy's
        "a whole number from 0 to 4294967295", lambda x: _whole(x) and 0 <= x < 2**32, kind=WHOLE_NUMBER
    ),
    "model.dtype": DTYPE,
    "model.lr": POSITIVE,
    "adapter.r": COUNT,
    "adapter.lora_alpha": POSITIVE,
    "adapter.lora_dropout": DROPOUT,
    "optimizer.lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.betas": BETAS,
    "optimizer.momentum": DROPOUT,
    "scheduler.warmup_ratio": SHARE,
    "scheduler.num_warmup_steps": WHOLE_OR_NULL,
    "loraplus.ratio": POSITIVE,
    "loraplus.lr_embedding": POSITIVE,
    "loraplus.lr_A": POSITIVE,
    "loraplus.lr_B": POSITIVE,
    "task.samples": WHOLE,
    "task.sample_tokens": COUNT,
    "task.args.max_length": COUNT_OR_NULL,
    "task.max_length": COUNT_OR_NULL,
    "task.block_size": Range(
        "a whole number from 2 on", lambda x: _whole(x) and x >= 2, nullable=True, kind=WHOLE_NUMBER
    ),
    "task.problem_type": Range(f"{', '.join(PROBLEM_TYPES)} or null", lambda x: x in PROBLEM_TYPES, nullable=True),
    "data.eval_fraction": PROPER_SHARE,
    "data.max_samples": COUNT_OR_NULL,
    "trainer.num_train_epochs": POSITIVE,
    "trainer.max_steps": Range(
        "a whole number from 1 on, or -1 for num_train_epochs",
        lambda x: _whole(x) and (x >= 1 or x == -1),
        kind=WHOLE_NUMBER,
    ),
    "trainer.per_device_train_batch_size": COUNT,
    "trainer.per_device_eval_batch_size": COUNT,
    "trainer.gradient_accumulation_steps": COUNT,
    "trainer.max_grad_norm": NOT_NEGATIVE,
    "trainer.logging_steps": EVERY,
    "trainer.eval_steps": Range(EVERY.words + ", or null", EVERY.holds, nullable=True, kind=NUMBER),
    "trainer.save_steps": EVERY,
    "trainer.save_total_limit": COUNT_OR_NULL,
    "trainer.early_stopping_patience": COUNT_OR_NULL,
    "trainer.early_stopping_threshold": NOT_NEGATIVE,
    "trainer.dataloader_num_workers": WHOLE,
    "trainer.resume_from_checkpoint": Range(
        "auto, a checkpoint's folder, or null", lambda x: isinstance(x, str) and x != "", nullable=True
    ),
}

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
    for path, allowed in RANGES.items():
        present, value = select(plain, path)
        if present and not (allowed.nullable and value is None) and not allowed.holds(value):
            wrong_kind = allowed.kind is not None and not _IS_OF[allowed.kind](value)
            what = f"is not {allowed.kind}" if wrong_kind else "is out of range"
            problems.append(Problem(path, f"{shown(value)} {what}", f"it must be {allowed.words}"))
    for place in ("trainer", "task.args"):
        present, arguments = select(plain, place)
        names = arguments if present and isinstance(arguments, dict) else ()
        problems += [problem for name in names if (problem := set_elsewhere(f"{place}.{name}"))]
    problems += _endless(plain) + _rows_left_out(plain) + _never_evaluated(plain) + _lone_answers(plain)
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


def _lone_answers(plain: dict[str, Any]) -> list[Problem]:
    """KTO's loss needs, for each prompt of a batch, the answer to another one."""
    trainer, rows = (select(plain, path)[1] for path in ("task._target_", "trainer.per_device_train_batch_size"))
    if trainer != "trl.KTOTrainer" or rows != 1 or select(plain, "task.args.loss_type")[1] == "apo_zero_unpaired":
        return []
    what = "KTO takes for each prompt of a batch the answer to another one, and a batch of one row has none"
    return [Problem("trainer.per_device_train_batch_size", what, "2 or more")]


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
