"""`check`: everything that is wrong with a config, and nothing trained."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check
from loraplus_hydra.tasks.examples import kept_examples


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Raise ConfigErrors, or say that all is well."""
    check(config)
    examples = kept_examples(config)
    for note in examples.notes if examples else ():
        print(f"Note: {note}")
    print("The config is right: everything that can be known before weights load has been checked.")
