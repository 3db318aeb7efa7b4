"""metrics.jsonl: a line for each logged step and each evaluation, also of an interrupted run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loraplus_hydra.io.files import append_text


class MetricsLog:
    """Appends lines to a run's metrics.jsonl.

    Every line has the step and the seconds since the run's start. A line of training also has `lr` and `norms`. `lr` is
    the rate of each group in that step. `norms` has, for each group, the norm of its weights and the norm of its update
    in that step.
    """

    def __init__(
        self, path: Path, *, seconds: float = 0.0, report: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.path = path
        self.started = time.perf_counter() - seconds  # a resumed run includes its earlier seconds
        self.report = report  # called with each line after the line is written

    def write(
        self,
        step: int,
        values: Mapping[str, Any],
        *,
        rates: Mapping[str, float] | None = None,
        norms: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one line."""
        line: dict[str, Any] = {"step": step, "seconds": round(time.perf_counter() - self.started, 3)}
        if rates is not None:
            line["lr"] = dict(rates)
        if norms is not None:
            line["norms"] = dict(norms)
        line.update(values)
        append_text(self.path, json.dumps(line, allow_nan=True) + "\n")
        if self.report is not None:
            self.report(line)
