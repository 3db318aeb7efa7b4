"""A sweep read, grouped and compared: what tables, figures and page are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplus_hydra.report import formatting
from loraplus_hydra.report.compare import Outcome, compare
from loraplus_hydra.report.read_sweep import Sweep, collect
from loraplus_hydra.report.settings import SEED, Setting, settings_of, varied_keys


@dataclass(frozen=True)
class SweepResults:
    """A sweep and what it says."""

    sweep: Sweep
    keys: tuple[str, ...]  # those that vary, the seed last
    settings: tuple[Setting, ...]
    outcome: Outcome

    @property
    def compared(self) -> tuple[str, ...]:
        """The varied keys without the seed."""
        return tuple(key for key in self.keys if key != SEED)

    @property
    def names(self) -> Mapping[str, str]:
        """Each varied key's short name."""
        return formatting.names(self.keys)

    @property
    def better(self) -> str:
        """Which way the metric improves: `higher` or `lower`."""
        return "higher" if self.sweep.greater_is_better else "lower"

    @property
    def seeds(self) -> bool:
        """Whether a setting has more than one seed, so that there is a spread."""
        return any(len(one.measured) > 1 for one in self.settings)

    def label(self, setting: Setting) -> str:
        """`ratio 16, lr 5e-5`."""
        return formatting.setting_text(setting.values, self.names)

    def folded_label(self, setting: Setting, width: int, *, ahead: str = "") -> str:
        """`label` behind `ahead`, in lines of `width` characters and with long values cut: as a figure has room."""
        values = [
            f"{self.names[key]} {formatting.clipped(formatting.short(one))}" for key, one in setting.values.items()
        ]
        *first, last = values or [self.label(setting)]
        return formatting.folded((*([ahead] if ahead else ()), *(f"{one}, " for one in first), last), width)


def results_of(folder: Path) -> SweepResults:
    """Read the sweep in `folder`."""
    sweep = collect(folder)
    keys = varied_keys(sweep)
    settings = settings_of(sweep, keys)
    return SweepResults(sweep, keys, settings, compare(settings, greater_is_better=sweep.greater_is_better))
