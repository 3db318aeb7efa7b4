"""`check`: everything that is wrong with a config, and nothing trained."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Raise ConfigErrors, or say that all is well."""
    check(config)
    print("The config is right: everything that can be known before weights load has been checked.")
