"""`predict`: print or write the answers of a finished run's adapter to texts."""

from __future__ import annotations

import json

from omegaconf import DictConfig

from loraplus_hydra.cli.commands.command import Command, range_problems
from loraplus_hydra.config.schema import PredictConfig
from loraplus_hydra.errors import Problem, refuse
from loraplus_hydra.io import files, interrupts
from loraplus_hydra.runs.finished import open_named_run
from loraplus_hydra.runs.stored_config import unnamed_run


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the answers, or write them to the file `out`. Raises UserError."""
    refuse([*unnamed_run(config), *_problems(config)])
    if not config.out:
        print("\n".join(_answers(config)))
        return
    with files.reserved(config.out, key="out") as out:
        lines = _answers(config)
        files.write_text(out, "\n".join(lines) + "\n")
    print(f"{len(lines):,} answers are in {out}")


def _answers(config: DictConfig) -> list[str]:
    """Return a line of JSON for each text."""
    run = open_named_run(config)
    from loraplus_hydra.runs.predict import predict, read_texts

    if config.file is not None:
        texts, pairs = read_texts(config.file, config.column, run)
    else:
        texts, pairs = [config.text], [config.text_pair]
    names = ("max_new_tokens", "batch_size", "temperature", "top_p")
    answers = predict(run, texts, pairs, **{name: config[name] for name in names})
    with interrupts.notice("the current answer is finished, but no answers are written"):
        return [json.dumps(line, ensure_ascii=False) for line in answers]


def _problems(config: DictConfig) -> list[Problem]:
    problems = [*range_problems(config, PredictConfig)]
    if (config.text is None) == (config.file is None):
        what = "neither text nor file is set" if config.text is None else "both text and file are set"
        problems.append(Problem("text", what, "set one of them: text=... or file=..."))
    return problems


COMMAND = Command(
    "predict",
    "try a finished run's adapter on a text or a file",
    main,
    usage="RUN text=...",
    config="predict",
    positional="run",
    verbatim=("text",),
    changes=("model",),
)
