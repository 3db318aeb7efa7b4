"""TensorBoard: event files in the run's folder; `tensorboard --logdir outputs` shows all runs beside one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loraplus_hydra.config.flatten import flat
from loraplus_hydra.io.result import FAILED, OK
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker


class TensorBoard(Tracker):
    """Scalars at their steps, the config as hyperparameters, the run's end under `final/` and `status`."""

    needs: ClassVar[tuple[str, ...]] = ("tensorboard",)
    extra: ClassVar[str] = "tensorboard"

    def __init__(self, folder: str = "tensorboard") -> None:
        self.folder = folder
        self._writer: Any = None
        self._step = 0

    def start(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # What was written of later steps, before the run was stopped, is left out by whoever reads the files.
        beginning = 0 if not run.resumed_at else run.resumed_at + 1
        self._step = run.resumed_at or 0
        self._writer = SummaryWriter(str(run.folder / self.folder), purge_step=beginning)
        settings = {key: _simple(value) for key, value in flat(run.config).items()}
        metric = run.config.get("task", {}).get("metric", "eval_loss")
        for summary in hparams(settings, {f"final/{metric}": 0.0})[:2]:  # the third tells of an end that is yet to come
            self._add(summary)
        self._writer.add_text("run", run.name, self._step)
        if run.group is not None:
            self._writer.add_text("sweep", run.group, self._step)
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed has lost nothing

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"final/{name}", value, self._step)
        self._writer.add_text("status", status, self._step)
        self._add(_end(status))
        self._writer.close()

    def _add(self, summary: Any) -> None:
        self._writer.file_writer.add_summary(summary, self._step)


def _end(status: str) -> Any:
    """What TensorBoard's hyperparameters plugin reads of a session's end."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    ends = {OK: api_pb2.STATUS_SUCCESS, FAILED: api_pb2.STATUS_FAILURE}
    data = plugin_data_pb2.HParamsPluginData(
        version=metadata.PLUGIN_DATA_VERSION,
        session_end_info=plugin_data_pb2.SessionEndInfo(status=ends.get(status, api_pb2.STATUS_UNKNOWN)),
    )
    told = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(data))
    return Summary(value=[told])


def _simple(value: Any) -> bool | float | str:
    return value if isinstance(value, (bool, int, float, str)) else "" if value is None else str(value)
