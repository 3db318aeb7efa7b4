"""`train`: what is done before Hydra makes the run's folder; the run itself is `loraplus_hydra.runs.job.run`."""

from __future__ import annotations

from omegaconf import DictConfig

from loraplus_hydra.check import check


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Raise ConfigErrors for a config that is wrong, so that it leaves no folder behind."""
    check(config)
