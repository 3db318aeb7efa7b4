"""The page of the reference on the JSON files of runs and sweeps, made from the source."""

from __future__ import annotations

import re
from pathlib import Path

from tools.docs.markdown import code, prose
from tools.docs.source_keys import SourceKey, keys_of

# File -> the places in the package that decide its keys. `a <- place`: these are the keys of the value of `a`.
_RUN = {
    "result.json": ["io/result.py:Result"],
    "param_groups.json": ["loraplus/plan.py:PlannedTensor.as_dict"],
    "rungs.json": ["rungs[] <- io/rungs.py:Rung"],
    "harness/*.json": ["runs/harness.py:evaluate_tasks"],
    "checkpoints/checkpoint-*/run_state.json": [
        "io/checkpoint_state.py:RunState",
        "window <- io/checkpoint_state.py:LogWindow",
        "groups.NAME <- io/checkpoint_state.py:GroupState",
        "schedule <- io/checkpoint_state.py:ScheduleState",
        "stream <- io/checkpoint_state.py:StreamState",
    ],
}
_SWEEP = {
    "sweep.json": ["sweep/plan.py:_write_sweep_file"],
    "halving.json": ["sweep/halving_search.py:_write", "rungs[].candidates[] <- sweep/halving.py:Standing"],
    "tune.json": ["sweep/tune_answer.py:write_answer", "verdict <- sweep/tuning.py:Verdict"],
}
_PRINTED = {
    "inspect --json": [
        "runs/inspection.py:Inspection.as_dict",
        "memory_bytes <- loraplus/memory.py:Memory",
        "step_memory <- training/hf_trainer/step_memory.py:StepMemory",
    ]
}
# Keys that come from other libraries, or that are added later.
_MORE = {
    "metrics.jsonl": {
        "step": "optimizer steps taken",
        "seconds": "seconds since the start of the run",
        "epoch": "passes over the data",
        "lr": "the rate of each group in this step",
        "norms": "for each group, `weight`: the norm of its weights, and `update`: the norm of its update in this step",
        "loss": "mean training loss since the last line",
        "grad_norm": "norm of the gradient, before clipping",
        "tokens_per_second": "tokens of the batches per second of training",
        "memory_bytes": "peak memory so far",
        "model_flops_utilisation": "share of the peak of a known GPU that the model's products take",
        "entropy": "TRL's, for `task=sft`: mean entropy of the next token",
        "mean_token_accuracy": "TRL's, for `task=sft`: share of tokens that are the likeliest ones",
        "num_tokens": "TRL's, for `task=sft`: tokens seen so far",
        "eval_loss": "loss of an evaluation; every other metric of the task begins with `eval_`, too",
        "eval_ema_loss": "the same for the average of the weights (`trainer.ema`)",
    },
    "sweep.json": {"left": "the jobs that a stopped sweep has not begun"},
    "checkpoints/checkpoint-*/manifest.json": {"files": "for each file its `size` in bytes and its `sha256`"},
}
_ABOUT = """# Files and their keys

[A run's folder](../explained/run-folder.md) and [Sweeps](../howto/sweeps.md) show which files there are. This page
lists the keys of the JSON files. Names of files and keys are an interface: the [changelog](../../CHANGELOG.md) lists
each change. Numbers that are NaN or infinite are `null` in `result.json`."""
_KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "list": "list",
    "tuple": "list",
}


def file_page(package: Path) -> str:
    """Return the page as Markdown."""
    of_run = [*_RUN, "metrics.jsonl", "checkpoints/checkpoint-*/manifest.json"]
    parts = [_ABOUT]
    for heading, files in (("A run", of_run), ("A sweep", _SWEEP), ("Printed", _PRINTED)):
        parts.append(f"## {heading}")
        for file in files:
            places = (_RUN | _SWEEP | _PRINTED).get(file, [])
            lines = [line for place in places for line in _lines(package, place)]
            lines += [f"- {code(key)}: {prose(about, 'reference')}" for key, about in _MORE.get(file, {}).items()]
            parts += [f"### {file}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _lines(package: Path, place: str) -> list[str]:
    outer, _, where = place.rpartition(" <- ")
    path, _, name = where.partition(":")
    return [_line(key, f"{outer}." if outer else "") for key in keys_of(package / path, name)]


def _line(key: SourceKey, prefix: str) -> str:
    kind = re.split(r"[\[ ]", key.type)[0]
    kind = _KINDS.get(kind, "mapping" if kind else "") + (" or null" if key.type.endswith("| None") else "")
    comment = key.comment.replace("None if", "null if").replace("None =", "null =")
    return f"- {code(prefix + key.name)}" + (f" ({kind})" if kind else "") + f": {prose(comment, 'reference')}"
