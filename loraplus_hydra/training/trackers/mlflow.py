"""MLflow, by default into a sqlite file beside the runs, which needs no server."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from loraplus_hydra.config.flatten import flat
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.result import FAILED, INTERRUPTED
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker, remembered

ID = "mlflow_run_id"  # in the run's folder: a resumed run goes on under it
_SQLITE = "sqlite:///"
_ENDS = {FAILED: "FAILED", INTERRUPTED: "KILLED"}
_BATCH = 100  # parameters that MLflow takes at once
_LONGEST = 6000  # characters of a parameter
_NOT_IN_NAMES = re.compile(r"[^\w.\-/ ]")
# What a clock says differs each time that a step is taken; what was written first stays.
_CLOCKS = ("seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class MLflow(Tracker):
    """A run of MLflow's with the config as its parameters and the sweep's name as its tag `sweep`.

    It talks to the store through a client of its own and leaves MLflow's process-wide active run alone.
    """

    needs: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")
    extra: ClassVar[str] = "mlflow"

    def __init__(self, tracking_uri: str = "sqlite:///outputs/mlflow.db", experiment: str = "loraplus_hydra") -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self._client: Any = None
        self._run_id = ""
        self._there: dict[tuple[str, int], float] = {}  # what a run that goes on had told before it was stopped
        self._step = 0

    def start(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # of each table that it makes it tells
        uri, place = located(self.tracking_uri, run.started_in)
        if place is not None and not uri.startswith(_SQLITE):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder was asked for; later versions ask again
        with _store_lock(place):  # two jobs that make the tables at the same time break one another's
            self._client = MlflowClient(tracking_uri=uri)
            experiment = self._client.get_experiment_by_name(self.experiment)
            number = experiment.experiment_id if experiment else self._new_experiment(place)
        if not self._resumed(run):
            self._begin(number, run)
        write_text(run.folder / ID, self._run_id + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        new = {name: value for name, value in values.items() if self._is_new(name, step, value)}
        self._write(new)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        try:
            self._write({f"final/{name}": value for name, value in metrics.items()})
            self._client.set_tag(self._run_id, "status", status)
        finally:
            self._client.set_terminated(self._run_id, _ENDS.get(status, "FINISHED"))

    def _new_experiment(self, place: Path | None) -> Any:
        artifacts = None if place is None else (place.parent / "mlflow_artifacts").as_uri()
        return self._client.create_experiment(self.experiment, artifact_location=artifacts)

    def _begin(self, experiment: Any, run: TrackedRun) -> None:
        tags = {"folder": str(run.folder), **({"sweep": run.group} if run.group is not None else {})}
        self._run_id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        self._tell(_settings(run.config))

    def _resumed(self, run: TrackedRun) -> bool:
        """Go on with the run that is known, if there is one; settings that have changed become tags.

        MLflow's parameters can't be changed.
        """
        from mlflow.exceptions import MlflowException

        known = remembered(run.folder / ID) if run.resumed_at is not None else None
        if known is None:
            return False
        try:
            stored = self._client.get_run(known)
        except MlflowException:  # another store
            return False
        self._run_id = known
        self._client.update_run(known, status="RUNNING")
        settings = _settings(run.config)
        self._tell({key: value for key, value in settings.items() if key not in stored.data.params})
        for key, value in settings.items():
            if stored.data.params.get(key, value) != value:
                self._client.set_tag(known, f"changed.{key}", value)
        for name in stored.data.metrics:
            if not name.startswith("final/"):
                history = self._client.get_metric_history(known, name)
                self._there |= {(name, each.step): each.value for each in history}
        return True

    def _is_new(self, name: str, step: int, value: float) -> bool:
        there = self._there.get((_name(name), step))
        if there is None:
            return True
        same = there == value or (there != there and value != value)
        return not same and name not in _CLOCKS

    def _tell(self, settings: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        told = [Param(key, value) for key, value in settings.items()]
        for start in range(0, len(told), _BATCH):
            self._client.log_batch(self._run_id, params=told[start : start + _BATCH])

    def _write(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if values:
            metrics = [Metric(_name(name), value, now, self._step) for name, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)


def located(uri: str, start: Path) -> tuple[str, Path | None]:
    """A store's address with its relative path from `start` on, and its file or folder here; None for a server."""
    if uri.startswith(_SQLITE):
        file = start / Path(uri.removeprefix(_SQLITE)).expanduser()
        return f"{_SQLITE}{file}", file
    if "://" in uri or uri.startswith("databricks"):
        return uri, None
    folder = start / Path(uri.removeprefix("file:")).expanduser()
    return folder.as_uri(), folder


@contextmanager
def _store_lock(place: Path | None) -> Iterator[None]:
    """Make other processes that open the same local store wait until the block ends."""
    with ExitStack() as stack:
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError, NotImplementedError):  # a file system without locks
                stack.enter_context(FileLock(place.with_name(f".{place.name}.lock")))
        yield


def _name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    return {_name(key): str(value)[:_LONGEST] for key, value in flat(config).items()}
