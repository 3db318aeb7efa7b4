"""The Hydra sweepers of `halving=true` and `tune`.

Hydra takes sweepers only from the namespace package `hydra_plugins`, whose modules it imports at each start.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class HalvingSweeper(BasicSweeper):
    """Hydra's sweeper of grids, in batches between which jobs leave.

    `start` identifies the start of the sweep. With `tune`, the grid is that of `tune`. The other arguments are those of
    the basic sweeper.
    """

    def __init__(
        self,
        start: str,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        *,
        tune: bool = False,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.start = start
        self.tune = tune
        self.batches: Iterator[Sequence[Sequence[str]]] | None = None
        self.batch: Sequence[Sequence[str]] = ()

    def is_done(self) -> bool:
        """Return True if no batch is left. All jobs of the batch before have ended."""
        if self.batches is None:
            self.batches = self._chunks()
        self.batch = next(self.batches, ())
        return not self.batch

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """Return the overrides of the jobs to launch."""
        return self.batch

    def _chunks(self) -> Iterator[Any]:
        assert self.config is not None
        assert self.overrides is not None
        jobs = list(itertools.chain.from_iterable(self.overrides))
        for batch in self._batches(jobs, Path(self.config.hydra.sweep.dir)):
            yield from self.split_overrides_to_chunks([list(job) for job in batch], self.max_batch_size)

    def _batches(self, jobs: Sequence[Sequence[str]], folder: Path) -> Iterator[Sequence[Sequence[str]]]:
        # Takes long, and most starts of Hydra run no such sweep
        from loraplus_hydra.sweep import halving_search, tune_search

        assert self.config is not None
        if self.tune:
            (words,) = jobs  # the command line has no sweep of its own
            return tune_search.batches(tune_search.check_tuning(self.config), words, folder, self.start)
        greater = bool(self.config.task.greater_is_better)
        return halving_search.batches(jobs, folder, self.start, greater_is_better=greater)
