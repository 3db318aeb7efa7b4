"""`predict`: print or write the answers of a finished run's adapter to texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.cli.commands.command import Command, range_problems
from loraplus_hydra.config.command_schemas import PredictConfig
from loraplus_hydra.errors import Problem, refuse
from loraplus_hydra.io import files, interrupts
from loraplus_hydra.io.result import finite
from loraplus_hydra.io.screen import RowProgress
from loraplus_hydra.io.streams import is_read
from loraplus_hydra.io.text import json_line
from loraplus_hydra.runs.finished import open_named_run
from loraplus_hydra.runs.stored_config import unnamed_run

_STOPS = "the answers so far are kept"


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the answers, or write them to the file `out`. Raises UserError."""
    refuse([*unnamed_run(config), *_problems(config)])
    if config.out:
        with files.reserved(config.out, key="out") as out:
            count = _write(out, config)
        print(f"{count:,} answers are in {out}")
        return
    answers, total = _answers(config)
    with interrupts.notice(_STOPS), RowProgress(total) as progress:
        for answer in answers:
            if not is_read():  # `| head` has closed the pipe
                break
            progress.print(json_line(finite(answer if config.scores else _short(answer))))
            progress.advance()


def _write(out: Path, config: DictConfig) -> int:
    """Write a line of JSON for each text to `out`, and return their number.

    If it is stopped, the answers so far are written to another file.
    """
    lines: list[str] = []
    answers, total = _answers(config)
    try:
        with interrupts.notice(_STOPS), RowProgress(total) as progress:
            for answer in answers:
                lines.append(json_line(finite(answer)) + "\n")
                progress.advance()
    except BaseException:
        if lines:
            part = files.write_beside(out, ".part", "".join(lines))
            print(f"The first {len(lines):,} of {total:,} answers are in {part}", file=sys.stderr)
        raise
    files.write_text(out, "".join(lines))
    return len(lines)


def _answers(config: DictConfig) -> tuple[Iterator[dict[str, Any]], int]:
    """Load the run, and return its answers to the texts, and the number of texts."""
    run = open_named_run(config)
    from loraplus_hydra.runs.predict import predict, read_texts

    if config.file is not None:
        texts, pairs = read_texts(config.file, config.column, run)
    else:
        texts, pairs = [config.text], [config.text_pair]
    names = ("max_new_tokens", "batch_size", "temperature", "top_p")
    return predict(run, texts, pairs, **{name: config[name] for name in names}), len(texts)


def _short(answer: dict[str, Any]) -> dict[str, Any]:
    """Return a classifier's answer with the scores of its labels only."""
    if "scores" not in answer:
        return answer
    scores = answer.pop("scores")
    label = answer["label"]
    found = [round(scores[name], 4) for name in (label if isinstance(label, list) else [label])]
    return {**answer, "score": found if isinstance(label, list) else found[0]}


def _problems(config: DictConfig) -> list[Problem]:
    problems = [*range_problems(config, PredictConfig)]
    if (config.text is None) == (config.file is None):
        what = "neither text nor file is set" if config.text is None else "both text and file are set"
        problems.append(Problem("text", what, "set one of them: text=... or file=..."))
    for key in ("text", "text_pair"):  # Python reads bytes of the command line that aren't UTF-8 as lone surrogates
        text = config[key] or ""
        if text.encode("utf-8", "ignore").decode("utf-8") != text:
            problems.append(Problem(key, "the text isn't UTF-8", "set the terminal's encoding to UTF-8"))
    return problems


COMMAND = Command(
    "predict",
    "try a finished run's adapter on a text or a file",
    main,
    usage="RUN text=...",
    config="predict",
    positional="run",
    verbatim=("text", "text_pair", "file", "out"),
    changes=("model",),
)
