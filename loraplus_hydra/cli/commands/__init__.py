"""The first words of the command line, one module each: `main(config, flags)` does what the word says.

`config` is the composed config of the command (a `run` for most), `flags` the `--name` words that it knows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A first word: what it does, and what may stand behind it."""

    does: str  # for --help
    config: str = "config"  # the YAML that it composes: `config` is a run
    positional: str | None = None  # the key that a bare word right behind it sets
    flags: tuple[str, ...] = ()  # `--name` words of its own
    verbatim: tuple[str, ...] = ()  # keys whose value is any text, taken as it is typed
    changes: tuple[str, ...] = ()  # groups of the finished run's config that its overrides change: data.eval=...


TRAIN, RESUME = "train", "resume"
COMMANDS: dict[str, Command] = {
    TRAIN: Command("train one run (the word can be left out); -m trains one for each combination of values"),
    "inspect": Command(
        "show every trained tensor's role, rule, group and rate, and the memory; loads no weights (--tensors, --json)",
        flags=("tensors", "json"),
    ),
    "preview": Command("show three training rows as the model will see them: tokens, and which of them carry loss"),
    "export": Command(
        "write a finished run's merged model (merge=false: its adapter), with a card, into a new folder: export RUN",
        config="export",
        positional="run",
        changes=("model",),
    ),
    "predict": Command(
        "try a finished run's adapter on a text or a file: predict RUN text=...",
        config="predict",
        positional="run",
        verbatim=("text",),
        changes=("model",),
    ),
    "evaluate": Command(
        "evaluate a finished run, on other rows if you like: evaluate RUN data=jsonl data.eval=...",
        config="evaluate",
        positional="run",
        changes=("model", "data", "trainer"),
    ),
    RESUME: Command(
        "go on with a run that was stopped, from its newest whole checkpoint: resume RUN [trainer.max_steps=...]",
        config="resume",
        positional="run",
        changes=(
            "model",
            "quantization",
            "adapter",
            "optimizer",
            "scheduler",
            "loraplus",
            "task",
            "data",
            "trainer",
            "logger",
        ),
    ),
    "report": Command(
        "make a sweep's table, page and figures again from its folder: report DIR", config="report", positional="folder"
    ),
    "check": Command("say everything that is wrong with the config, train nothing"),
}
