"""The study's log, and the runs that are missing from it.

The log has one JSON line for each finished run. A run that diverged is finished, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from loraplus_hydra.io.read import read_lines

Line = dict[str, Any]  # a line of the log


@dataclass(frozen=True)
class Setting:
    """The keys that differ between the runs of a grid."""

    lr: float
    ratio: float
    seed: int

    def overrides(self) -> list[str]:
        """Return the setting in the words of the command line."""
        return [f"optimizer.lr={self.lr}", f"loraplus.ratio={self.ratio}", f"seed={self.seed}"]


@dataclass(frozen=True)
class Grid:
    """A grid of rates and ratios, and its finished runs."""

    name: str
    title: str
    overrides: Sequence[str]  # as in the YAML file: a path is ${...}, so that the log fits every machine
    rates: Sequence[float]
    ratios: Sequence[float]
    seeds: Sequence[int]
    best: int  # rates of each ratio that are repeated with the other seeds
    metric: str
    greater_is_better: bool
    needs: Sequence[str] = ()
    runs: dict[Setting, Line] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of runs, finished or not."""
        return len(self.ratios) * (len(self.rates) + self.best * (len(self.seeds) - 1))

    def value(self, setting: Setting) -> float | None:
        """Return the metric of a run; None if the run is missing or has diverged."""
        value = self.runs.get(setting, {}).get("metrics", {}).get(self.metric)
        return None if value is None else float(value)

    def values(self, lr: float, ratio: float, seeds: Sequence[int] | None = None) -> list[float]:
        """Return the metrics of the finished runs with a rate and a ratio, of all seeds or some.

        A diverged run counts as the worst possible value.
        """
        worst = -math.inf if self.greater_is_better else math.inf
        settings = [Setting(lr, ratio, seed) for seed in seeds or self.seeds]
        found = [self.value(setting) for setting in settings if setting in self.runs]
        return [worst if value is None else value for value in found]

    def first(self, lr: float, ratio: float) -> list[float]:
        """Return the metric of the first seed's run; empty if the run is missing."""
        return self.values(lr, ratio, self.seeds[:1])

    def loss(self, values: Sequence[float]) -> float:
        """Return the mean of metrics, with a sign so that less is better."""
        return (-1 if self.greater_is_better else 1) * sum(values) / len(values)

    def ranked(self, ratio: float) -> list[float]:
        """Return the tried rates of a ratio. More seeds come first, then better means."""
        tried = {lr: values for lr in self.rates if (values := self.values(lr, ratio))}
        return sorted(tried, key=lambda lr: (-len(tried[lr]), self.loss(tried[lr])))

    def wanted(self) -> list[Setting]:
        """Return the runs in their order.

        The rates for the other seeds are known only when the first seed has run at all rates of a ratio.
        """
        first, *others = self.seeds
        grid = [Setting(lr, ratio, first) for ratio in self.ratios for lr in self.rates]
        repeated = {ratio: self._repeated(ratio) for ratio in self.ratios}
        return grid + [Setting(lr, ratio, seed) for seed in others for ratio in self.ratios for lr in repeated[ratio]]

    def _repeated(self, ratio: float) -> list[float]:
        values = {lr: self.first(lr, ratio) for lr in self.rates}
        if not all(values.values()):
            return []
        return sorted(self.rates, key=lambda lr: self.loss(values[lr]))[: self.best]

    def missing(self) -> list[Setting]:
        """Return the runs that are not in the log, in their order."""
        return [setting for setting in self.wanted() if setting not in self.runs]


def read_grids(config: Any, lines: Iterable[Line]) -> list[Grid]:
    """Return the config's grids with the runs of a log.

    A line belongs to the grid with the same overrides. So a run with changed overrides is missing.
    """
    stored = list(lines)
    shared = list(config.shared)
    grids = []
    for name, one in OmegaConf.to_container(config.grids).items():  # not resolved, so paths are left out
        one["rates"] = list(config.grids[name].rates)  # may be those of another grid
        one["overrides"] = [*one["overrides"], *shared]
        runs = {
            Setting(line["lr"], line["ratio"], line["seed"]): line
            for line in stored
            if line["overrides"] == one["overrides"]
        }
        grids.append(Grid(name=str(name), runs=runs, **one))
    return grids


def read_log(path: Path) -> list[Line]:
    """Return the lines of the log, without one that was cut off when its writer was killed."""
    return read_lines(path) if path.exists() else []


def append(path: Path, line: Line) -> None:
    """Append a line to the log, on a line of its own also after one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        cut = file.read() not in (b"", b"\n")
        file.write(b"\n" * cut + json.dumps(line).encode() + b"\n")
