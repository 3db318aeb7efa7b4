"""rungs.json: the losses of a job on held-out rows at each rung of a halved sweep."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from loraplus_hydra.config.types import FINITE, NOT_NEGATIVE, POSITIVE, Range, from_plain, range_
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.read import read_json, read_or
from loraplus_hydra.io.run_folder import RUNGS

FEWEST_STEPS = 6  # before this step, and before the end of warm-up, jobs are not compared
_STEP = Range("a whole number from 1 on", lambda x: 1 <= x < 2**53)  # a float represents it, too
_LOSSES = Range("finite numbers", lambda losses: all(map(FINITE.holds, losses)))
_WEIGHTS = Range("finite numbers from 0 on", lambda weights: all(map(NOT_NEGATIVE.holds, weights)))


@dataclass(frozen=True)
class Rung:
    """A job's losses at one rung. They are empty if the job was beyond the rung when it was asked."""

    stop_at: float = field(metadata=range_(POSITIVE))  # the share of all steps that the sweep asked for
    step: int = field(metadata=range_(_STEP))  # the step at which the job stopped
    steps: int = field(metadata=range_(_STEP))  # all steps of the job
    earliest: int = field(metadata=range_(_STEP))  # the first step at which jobs are compared
    losses: tuple[float, ...] = field(default=(), metadata=range_(_LOSSES))  # of each held-out row, or each batch
    # number of tokens with loss in each; for other losses, its number of rows
    weights: tuple[float, ...] = field(default=(), metadata=range_(_WEIGHTS))
    # task.metric on these rows; None if it is the loss, or if the Trainer alone can compute it
    metric: float | None = field(default=None, metadata=range_(FINITE))

    @property
    def loss(self) -> float:
        """The mean loss over all tokens of the rows."""
        return sum(map(float.__mul__, self.losses, self.weights)) / sum(self.weights)


def read_rungs(folder: Path) -> list[Rung]:
    """Return the rungs stored in a job's folder, without damaged entries; none if the file can't be read."""
    entries = read_or({}, read_json, folder / RUNGS).get("rungs")
    rungs = []
    for entry in entries if isinstance(entries, list) else ():
        with suppress(ValueError):
            rungs.append(_from_json(entry))
    return rungs


def _from_json(entry: object) -> Rung:
    """Return the rung of an entry. Raises ValueError if its values are invalid, or don't give a loss."""
    rung = from_plain(Rung, entry)
    rung = replace(rung, losses=tuple(map(float, rung.losses)), weights=tuple(map(float, rung.weights)))
    if rung.step > rung.steps or len(rung.losses) != len(rung.weights):
        raise ValueError("step or weights")
    if rung.losses and not (any(rung.weights) and math.isfinite(rung.loss)):
        raise ValueError("loss")
    return rung


def add_rung(folder: Path, rung: Rung) -> None:
    """Add a rung to the file in a job's folder."""
    rungs = [*(one for one in read_rungs(folder) if one.stop_at != rung.stop_at), rung]
    write_text(folder / RUNGS, json.dumps({"rungs": [asdict(one) for one in rungs]}) + "\n")
