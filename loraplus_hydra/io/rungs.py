"""rungs.json: the losses of a job on held-out rows at each rung of a halved sweep."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.read import Unreadable, read_json
from loraplus_hydra.io.run_folder import RUNGS

FEWEST_STEPS = 6  # before this step, and before the end of warm-up, jobs are not compared


@dataclass(frozen=True)
class Rung:
    """A job's losses at one rung. They are empty if the job was beyond the rung when it was asked."""

    stop_at: float  # the share of all steps that the sweep asked for
    step: int  # the step at which the job stopped
    steps: int  # all steps of the job
    earliest: int  # the first step at which jobs are compared
    losses: tuple[float, ...] = ()  # mean loss of each held-out row
    weights: tuple[float, ...] = ()  # number of tokens with loss in each row; 1 for other losses
    # task.metric on these rows; None if it is the loss, or if the Trainer alone can compute it
    metric: float | None = None

    @property
    def loss(self) -> float:
        """The mean loss over all tokens of the rows."""
        return sum(map(float.__mul__, self.losses, self.weights)) / sum(self.weights)


def read_rungs(folder: Path) -> list[Rung]:
    """Return the rungs stored in a job's folder; none if the file is missing or damaged."""
    rungs = []
    with suppress(Unreadable, KeyError, TypeError, ValueError):
        for entry in read_json(folder / RUNGS)["rungs"]:
            losses, weights = ([float(one) for one in entry.pop(name)] for name in ("losses", "weights"))
            rung = Rung(**entry, losses=tuple(losses), weights=tuple(weights))
            if len(losses) == len(weights) and 0 < rung.step <= rung.steps:
                rungs.append(rung)
    return rungs


def add_rung(folder: Path, rung: Rung) -> None:
    """Add a rung to the file in a job's folder."""
    rungs = [*(one for one in read_rungs(folder) if one.stop_at != rung.stop_at), rung]
    write_text(folder / RUNGS, json.dumps({"rungs": [asdict(one) for one in rungs]}) + "\n")
