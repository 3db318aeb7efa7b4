"""A sweep with its varied keys, its settings and their comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplus_hydra.report import formatting
from loraplus_hydra.report.compare import Outcome, compare
from loraplus_hydra.report.read_job import Job
from loraplus_hydra.report.read_sweep import Sweep, read_sweep
from loraplus_hydra.report.settings import SEED, Setting, settings_of, varied_keys


@dataclass(frozen=True)
class SweepResults:
    """A sweep, its settings and their comparison."""

    sweep: Sweep
    keys: tuple[str, ...]  # the varied keys; the seed is last
    settings: tuple[Setting, ...]
    outcome: Outcome

    @property
    def compared(self) -> tuple[str, ...]:
        """The varied keys, without the seed."""
        return tuple(key for key in self.keys if key != SEED)

    @property
    def names(self) -> Mapping[str, str]:
        """Each varied key's short name."""
        return formatting.names(self.keys)

    @property
    def better(self) -> str:
        """The direction in which the metric improves: `higher` or `lower`."""
        return "higher" if self.sweep.greater_is_better else "lower"

    @property
    def axis_label(self) -> str:
        """The label for axes and tables: the metric and its direction."""
        return f"{self.sweep.metric}, {self.better} is better"

    @property
    def seeds(self) -> bool:
        """Return True if a setting has more than one seed."""
        return any(len(one.measured) > 1 for one in self.settings)

    @property
    def jobs_best_first(self) -> list[Job]:
        """The jobs: the best first, then those in progress, pruned ones, and those without a result."""
        successful = [job for job in self.sweep.jobs if job.has_result]
        successful.sort(key=lambda job: job.value or 0.0, reverse=self.sweep.greater_is_better)
        sweep = self.sweep
        return [*successful, *sweep.in_progress, *sweep.pruned, *sweep.unsuccessful]

    def label(self, setting: Setting) -> str:
        """Return a setting's values as text: `ratio 16, lr 5e-5`."""
        texts = (f"{self.names[key]} {formatting.short(value)}" for key, value in setting.values.items())
        return ", ".join(texts) or "the one setting"

    def folded_label(self, setting: Setting, width: int, *, prefix: str = "") -> str:
        """Return `prefix` and the label in lines of `width` characters. Long values are clipped."""
        values = [
            f"{self.names[key]} {formatting.clipped(formatting.short(one))}" for key, one in setting.values.items()
        ]
        *first, last = values or [self.label(setting)]
        return formatting.folded((*([prefix] if prefix else ()), *(f"{one}, " for one in first), last), width)


def results_of(folder: Path) -> SweepResults:
    """Read and compare the sweep in `folder`."""
    sweep = read_sweep(folder)
    keys = varied_keys(sweep)
    settings = settings_of(sweep, keys)
    outcome = compare(settings, greater_is_better=sweep.greater_is_better, chosen=sweep.chosen)
    return SweepResults(sweep, keys, settings, outcome)
