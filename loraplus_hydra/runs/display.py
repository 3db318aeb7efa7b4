"""Tables and messages about a run: its config, rates, memory and result."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.config.defaults import changed_part
from loraplus_hydra.config.hydra_job import number_in_sweep
from loraplus_hydra.config.plain import flat, plain_of, without_credentials
from loraplus_hydra.io import run_folder
from loraplus_hydra.io.result import Result
from loraplus_hydra.io.screen import print_rich, show, table
from loraplus_hydra.io.text import one_line, visible
from loraplus_hydra.loraplus.plan import PlannedTensor, Row

if TYPE_CHECKING:
    from loraplus_hydra.loraplus.memory import Memory  # importing these loads torch
    from loraplus_hydra.training.hf_trainer.step_memory import StepMemory


def show_config(config: DictConfig) -> None:
    """Show as a tree what differs from a run without overrides."""
    from rich.tree import Tree

    def grow(branch: Tree, node: Mapping[Any, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping) and value and any(isinstance(inner, Mapping) for inner in value.values()):
                grow(branch.add(f"[bold]{_shown(key)}[/bold]"), value)
            elif isinstance(value, Mapping) and value:
                leaves = "  ".join(f"[dim]{_shown(inner)}[/dim]={_shown(item)}" for inner, item in value.items())
                branch.add(f"[bold]{_shown(key)}[/bold]  {leaves}")
            else:
                branch.add(f"[dim]{_shown(key)}[/dim]={_shown(value)}")

    changed = changed_part(config)
    others = len(flat(plain_of(config))) - len(flat(changed))
    rest = f"the other {others} keys have" if changed else "all keys have"
    tree = Tree(f"[bold]config[/bold]  [dim]{rest} their defaults, see {run_folder.CONFIG}[/dim]", guide_style="dim")
    grow(tree, without_credentials(changed))
    print_rich(tree, on_screen=number_in_sweep() in (None, 0))


def show_rates(rows: Sequence[Row]) -> None:
    """Show the table of rates."""
    names = ("lr", "weight decay", "state bits", "tensors", "parameters")
    cells = []
    for row in rows:
        bits = "?" if row.state_bits is None else str(row.state_bits or "none")
        numbers = (f"{row.lr:.3g}", f"{row.weight_decay:g}", bits, f"{row.tensors:,}", f"{row.numbers:,}")
        cells.append((row.role, row.rule, row.group, *numbers))
    rates = table(("role", "rule", "group", *names), cells, right=names)
    print_rich("What gets which rate", rates, on_screen=number_in_sweep() in (None, 0))


def show_explanation(lines: Sequence[str]) -> None:
    """Show the lines that explain the rates."""
    for line in lines:
        if number_in_sweep() in (None, 0):
            show(f"    {line}")


def show_tensors(tensors: Sequence[PlannedTensor]) -> None:
    """Show every trained tensor with its rate and the reason for it."""
    cells = []
    for tensor in tensors:
        record, group = tensor.record, tensor.group
        shape = " x ".join(map(str, record.shape))
        cells.append((record.name, shape, record.owner, group.name, f"{group.lr:.3g}", tensor.reason()))
    print_rich("Every trained tensor", table(("tensor", "shape", "owner", "group", "lr", "why"), cells, right=("lr",)))


def show_memory(memory: Memory, step: StepMemory) -> None:
    """Show the memory of a training's parts, and what recomputed activations would change."""
    rows = f"{step.rows} row{'s' * (step.rows != 1)}" + (f" of {step.tokens:,} tokens" if step.tokens else "")
    parts = (
        ("frozen weights", memory.weights),
        ("trained tensors", memory.adapter),
        ("their gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        (f"activations, {rows}", memory.activations),
        ("together", memory.total),
    )
    cells = [(name, "unknown" if size is None else f"{size / 2**20:,.1f}") for name, size in parts]
    print_rich("Memory of training, estimated", table(("what", "MiB"), cells, right=("MiB",)))
    if step.reason:
        print(visible(f"The activations are unknown: {step.reason}."))
    if step.other is not None and memory.activations is not None:
        total = memory.total - memory.activations + max(0, step.other - memory.gradients)
        setting = f"trainer.activation_checkpointing={str(not step.recomputes).lower()}"
        print(f"With {setting}: {total / 2**20:,.1f} MiB together.")


def show_result(folder: Path, result: Result) -> None:
    """Show a finished run's metrics, samples and files, and suggest next commands."""
    of_sweep = number_in_sweep() is not None
    _show_samples(result.samples, on_screen=not of_sweep)
    before, after = result.metrics_before.get(result.metric), result.value
    compared = ""
    if before is not None and after is not None:
        compared = f"{result.metric}: {before:.4f} before training, {after:.4f} after {result.steps} steps"
    if of_sweep:
        show(f"{compared or f'{result.steps} steps'}; {result.seconds:.0f} s, in {folder.name}")
        return
    if compared:
        show(compared)
    if (change := result.metrics.get("forgetting")) is not None:
        before, after = result.metrics["forgetting_loss_base"], result.metrics["forgetting_loss"]
        show(f"forgetting: {change:+.4f}; the loss of other text is {before:.4f} in the base model, now {after:.4f}")
    speed = "" if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f} tokens/s, "
    show(
        f"Trained {result.trained_parameters:,} of {result.total_parameters:,} parameters in {result.seconds:.0f} s: "
        f"{speed}at most {result.peak_memory_bytes / 2**20:,.0f} MiB"
    )
    show(f"All files are in {folder}")
    for name, what in (
        (run_folder.ADAPTER, "the adapter in PEFT's layout"),
        (run_folder.FIGURE, "loss and rates at each step"),
        (run_folder.METRICS, "a line for each logged step"),
        (run_folder.PARAM_GROUPS, "every trained tensor and its rate"),
        (run_folder.RESULT, "the result"),
    ):
        show(f"  {name:<20}{what}")
    config = OmegaConf.load(folder / run_folder.CONFIG)
    for command in _commands(folder, config, result):
        show(f"  python -m loraplus_hydra {command}")
    if next_steps := ", ".join(_next_steps(config)):
        show(f"Next: {next_steps}.")


def _commands(folder: Path, config: Any, result: Result) -> Iterator[str]:
    """Yield the commands that use a finished run."""
    place = shlex.quote(str(folder))
    yield f"predict {place} text='...'"
    if OmegaConf.select(config, "task.task_type") != "SEQ_CLS":
        yield f"chat {place}"
    yield f"export {place}"
    yield f"resume {place} trainer.max_steps={2 * result.steps}"


def _next_steps(config: Any) -> Iterator[str]:
    """Yield suggestions for a next run with other settings."""
    yield "a search for rate and ratio (python -m loraplus_hydra tune)"
    is_8bit = "8bit" in str(OmegaConf.select(config, "optimizer._target_")).lower()
    if not is_8bit and OmegaConf.select(config, "trainer.deepspeed") is None:  # DeepSpeed refuses 8-bit optimizers
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
    print_rich("Held-out prompts", answers, on_screen=on_screen)


def _shown(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = escape(one_line(str(value)))
    return f"{text}\\" if text.endswith("\\") else text  # a final backslash would escape the markup after it
