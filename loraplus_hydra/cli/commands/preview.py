"""`preview`: show three training rows as the model will see them."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check
from loraplus_hydra.cli.commands.command import Command
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.io import screen
from loraplus_hydra.io.text import visible


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the rows. Raises ConfigErrors for a config with errors."""
    checked = check(run_of(config))
    from loraplus_hydra.models.tokenizer import load_tokenizer
    from loraplus_hydra.runs.preview import preview, render
    from loraplus_hydra.training.prepare import prepare_examples

    tokenizer = load_tokenizer(checked.config.model)
    examples = prepare_examples(checked.config, tokenizer)
    print(examples.counts())
    for note in examples.notes:
        print(visible(f"Note: {note}"))
    rows = preview(checked, tokenizer, examples)
    console = screen.console()
    marked = "green" if console.is_terminal else "[in brackets]"
    if any(row.label is None for row in rows):
        print(f"Tokens with loss are {marked}. | separates tokens.")
    for index, row in enumerate(rows):
        title = f"{index // 2 + 1}, {row.side}" if row.side else f"{index + 1}"
        print(f"\nRow {title}: {row.summary()}")
        console.print(render(row, coloured=console.is_terminal), soft_wrap=not console.is_terminal)


COMMAND = Command("preview", "show three training rows as the model will see them, and which tokens have loss", main)
