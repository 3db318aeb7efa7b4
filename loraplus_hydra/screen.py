"""What a person sees of a run: the config as a tree, the groups as a table, progress, the result.

Plain lines when the output isn't a terminal. Everything said here is also in the run's log file, but for the progress
bar, whose numbers are in metrics.jsonl. Of a sweep the screen has tree and table once, for its first job, and a line
for how each job ended; the jobs' log files have it all.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra import paths, processes
from loraplus_hydra.hydra_job import number_in_sweep

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from loraplus_hydra.memory import Memory
    from loraplus_hydra.overview import Placed, Row
    from loraplus_hydra.results import Result

log = logging.getLogger("loraplus_hydra")


def say(text: str) -> None:
    """One line on the screen and in the log file, from the run's first process alone."""
    if processes.is_main():
        log.info(text)


def keep(text: str, level: int = logging.INFO) -> None:
    """What the log file alone has, if there is one."""
    fields = {"name": log.name, "levelno": level, "levelname": logging.getLevelName(level)}
    record = logging.makeLogRecord({**fields, "msg": "%s", "args": (text,)})
    for handler in logging.getLogger().handlers:  # not through the loggers, which have the screen for a handler too
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def show_config(config: Any) -> None:
    """The whole config as a tree."""
    from rich.tree import Tree

    def grow(branch: Tree, node: Mapping[Any, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping) and value and any(isinstance(inner, Mapping) for inner in value.values()):
                grow(branch.add(f"[bold]{key}[/bold]"), value)
            elif isinstance(value, Mapping) and value:
                leaves = "  ".join(f"[dim]{inner}[/dim]={_shown(item)}" for inner, item in value.items())
                branch.add(f"[bold]{key}[/bold]  {leaves}")
            else:
                branch.add(f"[dim]{key}[/dim]={_shown(value)}")

    tree = Tree("[bold]config[/bold]", guide_style="dim")
    grow(tree, config)
    _print(tree, on_screen=number_in_sweep() in (None, 0))


def show_overview(rows: Sequence[Row]) -> None:
    """The table of what gets which rate: a row for each distinct role, rule, group, rate, decay and state."""
    names = ("lr", "weight decay", "state bits", "tensors", "numbers")
    cells = []
    for row in rows:
        bits = "?" if row.state_bits is None else str(row.state_bits or "none")
        numbers = (f"{row.lr:.3g}", f"{row.weight_decay:g}", bits, f"{row.tensors:,}", f"{row.numbers:,}")
        cells.append((row.role, row.rule, row.group, *numbers))
    rates = table(("role", "rule", "group", *names), cells, right=names)
    _print("What gets which rate", rates, on_screen=number_in_sweep() in (None, 0))


def show_tensors(placed: Sequence[Placed]) -> None:
    """Every trained tensor with its rate and the reason for it."""
    cells = []
    for one in placed:
        shape = " x ".join(map(str, one.record.shape))
        cells.append((one.record.name, shape, one.record.owner, one.group.name, f"{one.group.lr:.3g}", one.why()))
    _print("Every trained tensor", table(("tensor", "shape", "owner", "group", "lr", "why"), cells, right=("lr",)))


def show_memory(memory: Memory, trained: int, total: int) -> None:
    """What weights, adapter, gradients and optimizer state take."""
    parts = (
        ("frozen weights", memory.weights),
        ("trained tensors", memory.adapter),
        ("their gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("together", memory.total),
    )
    cells = [(name, "unknown" if size is None else f"{size / 2**20:,.1f}") for name, size in parts]
    _print("Memory, without activations", table(("what", "MiB"), cells, right=("MiB",)))
    print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}).")


def show_result(folder: Path, result: Result) -> None:
    """How the run ended: metrics before and after, the samples, where things lie and what to try next."""
    of_sweep = number_in_sweep() is not None
    _show_samples(result.samples, on_screen=not of_sweep)
    before, after = result.metrics_before.get(result.metric), result.value
    compared = ""
    if before is not None and after is not None:
        compared = f"{result.metric}: {before:.4f} before training, {after:.4f} after {result.steps} steps"
    if of_sweep:
        say(f"{compared or f'{result.steps} steps'}; {result.seconds:.0f} s, in {folder.name}")
        return
    if compared:
        say(compared)
    say(f"Trained {result.trained_parameters:,} of {result.total_parameters:,} parameters in {result.seconds:.0f} s.")
    say(f"Everything lies in {folder}")
    for name, what in (
        (paths.ADAPTER, "the adapter, as PEFT loads it"),
        (paths.FIGURE, "loss and rates over steps"),
        (paths.METRICS, "a line for each logged step"),
        (paths.PARAM_GROUPS, "every trained tensor and its rate"),
        (paths.RESULT, "the result"),
    ):
        say(f"  {name:<20}{what}")
    if next_steps := ", ".join(_next_steps(folder)):
        say(f"Next: {next_steps}.")


def _next_steps(folder: Path) -> Iterator[str]:
    """What the run in `folder` leaves to be tried, by its config."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(folder / paths.CONFIG)
    ratio = OmegaConf.select(config, "loraplus.ratio")
    if ratio is not None:
        yield f"another ratio (loraplus.ratio={16 if ratio == 4 else 4})"
    if "8bit" not in str(OmegaConf.select(config, "optimizer._target_")).lower():
        yield "an 8-bit optimizer (optimizer=adamw8bit)"
    if OmegaConf.select(config, "data._target_") == "loraplus_hydra.data.embedded.load":
        yield "your own rows (data=jsonl)"


def _show_samples(samples: Sequence[Mapping[str, str]], *, on_screen: bool) -> None:
    if not samples:
        return
    cells = []
    for sample in samples:
        prompt = sample["prompt"] if len(sample["prompt"]) <= 240 else sample["prompt"][:240] + " ..."
        cells.append((prompt, sample["reference"], sample["before"], sample["after"]))
    answers = table(("prompt", "reference", "before", "after"), cells, lines=True)
    _print("Held-out prompts", answers, on_screen=on_screen)


def progress() -> Any:
    """A Trainer callback that shows progress: a bar on a terminal, a line for each logged step elsewhere."""
    from loraplus_hydra.progress import Progress

    return Progress(bar=sys.stdout.isatty())


def keep_only_our_progress(trainer: Any) -> None:
    """Take the Trainer's own printing away: it would write dicts between our lines."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _print(*renderables: Any, on_screen: bool = True) -> None:
    """On the screen as it is, and in the log file, if there is one, as plain text."""
    import io

    from rich.console import Console

    if on_screen:
        console().print(*renderables, sep="\n")
    text = io.StringIO()
    Console(file=text, width=160, no_color=True).print(*renderables, sep="\n")
    keep(f"\n{text.getvalue()}")


def console() -> Console:
    """A console on the present stdout; wide enough for the tables where there is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = (), lines: bool = False
) -> Table:
    """A table of texts as they are, never read as markup; the columns in `right` are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.ROUNDED if sys.stdout.isatty() else box.ASCII2, show_lines=lines)
    for name in columns:
        made.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def _shown(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return escape(str(value))
