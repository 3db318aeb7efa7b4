"""The MLflow tracker. By default it writes a sqlite file next to the runs and needs no server."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from filelock import FileLock

from loraplus_hydra.config.plain import flat
from loraplus_hydra.io.files import refuse_link, write_text
from loraplus_hydra.io.folders import make_folder
from loraplus_hydra.io.result import FAILED, INTERRUPTED
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker, read_id

ID = "mlflow_run_id"  # a file in the run's folder; a resumed run keeps its ID
_SQLITE, _FILE = "sqlite:///", "file://"
_STATUSES = {FAILED: "FAILED", INTERRUPTED: "KILLED"}
_BATCH = 100  # number of parameters that MLflow accepts in one call
_LONGEST = 6000  # maximum number of characters of a parameter
_NOT_IN_NAMES = re.compile(r"[^\w.\-/ ]")
# A repeated step has another duration and memory, so the first value is kept.
_DURATIONS = (
    *("seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
    *("tokens_per_second", "memory_bytes", "model_flops_utilisation"),
)


class MLflow(Tracker):
    """A tracker that logs to an MLflow run.

    The config becomes the run's parameters, and the sweep's name becomes its tag `sweep`. The tracker has its own
    client and doesn't change MLflow's process-wide active run.
    """

    needs: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")
    extra: ClassVar[str] = "mlflow"

    def __init__(self, tracking_uri: str = "sqlite:///outputs/mlflow.db", experiment: str = "loraplus_hydra") -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self._client: Any = None
        self._run_id = ""
        self._stored: dict[tuple[str, int], float] = {}  # values logged before a resume, by name and step
        self._step = 0

    def start(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # at lower levels each new table causes a message
        uri, store = resolve_uri(self.tracking_uri, run.started_in)
        if store is not None and not uri.startswith(_SQLITE):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # later versions need this variable for a folder
        with _store_lock(store):  # two jobs that make the tables at the same time would cause errors
            self._client = MlflowClient(tracking_uri=uri)
            experiment = self._client.get_experiment_by_name(self.experiment)
            experiment_id = experiment.experiment_id if experiment else self._create_experiment(store)
        known = read_id(run.folder / ID) if run.resumed_at is not None else None
        if known is None or not self._reopen_run(known, _parameters(run.config)):
            self._create_run(experiment_id, run)
        write_text(run.folder / ID, self._run_id + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        self._log_metrics({name: value for name, value in values.items() if self._is_new(name, step, value)})

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        try:
            self._log_metrics({f"final/{name}": value for name, value in metrics.items()})
            self._client.set_tag(self._run_id, "status", status)
        finally:
            self._client.set_terminated(self._run_id, _STATUSES.get(status, "FINISHED"))

    def _create_experiment(self, store: Path | None) -> Any:
        artifacts = None if store is None else (store.parent / "mlflow_artifacts").as_uri()
        return self._client.create_experiment(self.experiment, artifact_location=artifacts)

    def _create_run(self, experiment_id: Any, run: TrackedRun) -> None:
        tags = {"folder": str(run.folder), **({"sweep": run.group} if run.group is not None else {})}
        self._run_id = self._client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id
        self._log_parameters(_parameters(run.config))

    def _reopen_run(self, run_id: str, parameters: Mapping[str, str]) -> bool:
        """Resume the run `run_id` with its current `parameters`.

        Returns False if the store doesn't have the run.
        """
        from mlflow.exceptions import MlflowException

        try:
            stored = self._client.get_run(run_id)
        except MlflowException:  # it is another store
            return False
        self._run_id = run_id
        self._client.update_run(run_id, status="RUNNING")
        self._log_parameters({key: value for key, value in parameters.items() if key not in stored.data.params})
        for key, value in parameters.items():
            # Stored as a tag, because MLflow's parameters can't be changed
            if stored.data.params.get(key, value) != value:
                self._client.set_tag(run_id, f"changed.{key}", value)
        for name in stored.data.metrics:
            if not name.startswith("final/"):
                history = self._client.get_metric_history(run_id, name)
                self._stored |= {(name, each.step): each.value for each in history}
        return True

    def _is_new(self, name: str, step: int, value: float) -> bool:
        stored = self._stored.get((_name(name), step))
        if stored is None:
            return True
        same = stored == value or (stored != stored and value != value)  # NaN is not equal to itself
        return not same and name not in _DURATIONS

    def _log_parameters(self, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _BATCH])

    def _log_metrics(self, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if values:
            metrics = [Metric(_name(name), value, now, self._step) for name, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)


def resolve_uri(uri: str, start: Path) -> tuple[str, Path | None]:
    """Return the store's URI and its local path, resolved from the folder `start`.

    The path is None for a server.
    """
    if uri.startswith(_SQLITE):
        file = start / Path(uri.removeprefix(_SQLITE)).expanduser()
        return f"{_SQLITE}{file}", file
    if uri.startswith(_FILE):
        uri = unquote(uri.removeprefix(_FILE))
    if "://" in uri or uri.startswith("databricks"):
        return uri, None
    folder = start / Path(uri.removeprefix("file:")).expanduser()
    return folder.as_uri(), folder


@contextmanager
def _store_lock(store: Path | None) -> Iterator[None]:
    """Make other processes that open the same local store wait until the block ends."""
    with ExitStack() as stack:
        if store is not None:
            make_folder(store.parent)
            lock = store.with_name(f".{store.name}.lock")
            refuse_link(lock)
            with suppress(OSError, NotImplementedError):  # a file system without locks
                stack.enter_context(FileLock(lock))
        yield


def _name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)


def _parameters(config: Mapping[str, Any]) -> dict[str, str]:
    return {_name(key): str(value)[:_LONGEST] for key, value in flat(config).items()}
