"""What a person sees of a run: the config as a tree, the groups as a table, progress, the result.

Plain lines when the output isn't a terminal. Everything said here is also in the run's log file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra import paths, processes

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
    _print(tree)


def show_overview(rows: Sequence[Row]) -> None:
    """The table of what gets which rate: a row for each distinct role, rule, group, rate, decay and state."""
    right = ("lr", "weight decay", "state bits", "tensors", "numbers")
    table = _table("What gets which rate", "role", "rule", "group", *right, right=right)
    for row in rows:
        bits = "?" if row.state_bits is None else str(row.state_bits or "none")
        numbers = (f"{row.lr:.3g}", f"{row.weight_decay:g}", bits, f"{row.tensors:,}", f"{row.numbers:,}")
        table.add_row(row.role, row.rule, row.group, *numbers)
    _print(table)


def show_tensors(placed: Sequence[Placed]) -> None:
    """Every trained tensor with its rate and the reason for it."""
    table = _table("Every trained tensor", "tensor", "shape", "owner", "group", "lr", "why", right=("lr",))
    for one in placed:
        shape = " x ".join(map(str, one.record.shape))
        table.add_row(one.record.name, shape, one.record.owner, one.group.name, f"{one.group.lr:.3g}", one.why())
    _print(table)


def show_memory(memory: Memory, trained: int, total: int) -> None:
    """What weights, adapter, gradients and optimizer state take."""
    table = _table("Memory, without activations", "what", "MiB", right=("MiB",))
    parts = (
        ("frozen weights", memory.weights),
        ("trained tensors", memory.adapter),
        ("their gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("together", memory.total),
    )
    for name, size in parts:
        table.add_row(name, "unknown" if size is None else f"{size / 2**20:,.1f}")
    _print(table)
    print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}).")


def show_result(folder: Path, result: Result) -> None:
    """How the run ended: metrics before and after, the samples, where things lie and what to try next."""
    _show_samples(result.samples)
    before, after = result.metrics_before.get(result.metric), result.value
    if before is not None and after is not None:
        say(f"{result.metric}: {before:.4f} before training, {after:.4f} after {result.steps} steps")
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
    say("Next: another ratio (loraplus.ratio=4), an 8-bit optimizer (optimizer=adamw8bit), your own rows (data=jsonl).")


def _show_samples(samples: Sequence[Mapping[str, str]]) -> None:
    if not samples:
        return
    table = _table("Held-out prompts", "prompt", "reference", "before", "after", lines=True)
    from rich.text import Text

    for sample in samples:
        prompt = sample["prompt"] if len(sample["prompt"]) <= 240 else sample["prompt"][:240] + " ..."
        table.add_row(*(Text(text) for text in (prompt, sample["reference"], sample["before"], sample["after"])))
    _print(table)


def progress() -> Any:
    """A Trainer callback that shows progress: a bar on a terminal, a line for each logged step elsewhere."""
    from loraplus_hydra.progress import Progress

    return Progress(bar=sys.stdout.isatty())


def keep_only_our_progress(trainer: Any) -> None:
    """Take the Trainer's own printing away: it would write dicts between our lines."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _print(renderable: Any) -> None:
    """On the screen as it is, in the log file as plain text."""
    import io

    from rich.console import Console

    console().print(renderable)
    text = io.StringIO()
    Console(file=text, width=160, no_color=True).print(renderable)
    logging.getLogger("loraplus_hydra.screen").debug("\n%s", text.getvalue())


def console() -> Console:
    """A console on the present stdout; wide enough for the tables where there is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def _table(title: str, *columns: str, right: Sequence[str] = (), lines: bool = False) -> Table:
    from rich import box
    from rich.table import Table

    style = box.ROUNDED if sys.stdout.isatty() else box.ASCII2
    table = Table(title=title, title_justify="left", box=style, show_lines=lines)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _shown(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return escape(str(value))
