"""The TensorBoard tracker. Event files are in the run's folder.

`tensorboard --logdir outputs` shows all runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from loraplus_hydra.config.plain import flat
from loraplus_hydra.io.result import FAILED, OK
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker


class TensorBoard(Tracker):
    """A tracker that writes TensorBoard's event files.

    Numbers become scalars, and the config becomes hyperparameters. At the end, `final/...` and `status` are written.
    """

    needs: ClassVar[tuple[str, ...]] = ("tensorboard",)
    extra: ClassVar[str] = "tensorboard"

    def __init__(self, folder: str = "tensorboard") -> None:
        self.folder = folder
        self._writer: Any = None
        self._step = 0

    def start(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._step = run.resumed_at or 0
        # Readers then ignore values that an earlier start wrote for this and later steps.
        first = run.resumed_at + 1 if run.resumed_at else 0
        self._writer = SummaryWriter(str(run.folder / self.folder), purge_step=first)
        settings = {key: _hyperparameter(value) for key, value in flat(run.config).items()}
        metric = run.config.get("task", {}).get("metric", "eval_loss")
        # The third summary would report the end of the session
        for summary in hparams(settings, {f"final/{metric}": 0.0})[:2]:
            self._add(summary)
        self._writer.add_text("run", run.name, self._step)
        if run.group is not None:
            self._writer.add_text("sweep", run.group, self._step)
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # otherwise a killed run would lose lines

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"final/{name}", value, self._step)
        self._writer.add_text("status", status, self._step)
        self._add(_session_end(status))
        self._writer.close()

    def _add(self, summary: Any) -> None:
        self._writer.file_writer.add_summary(summary, self._step)


def _session_end(status: str) -> Any:
    """Return the summary about a session's end for TensorBoard's hyperparameters plugin."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    statuses = {OK: api_pb2.STATUS_SUCCESS, FAILED: api_pb2.STATUS_FAILURE}
    data = plugin_data_pb2.HParamsPluginData(
        version=metadata.PLUGIN_DATA_VERSION,
        session_end_info=plugin_data_pb2.SessionEndInfo(status=statuses.get(status, api_pb2.STATUS_UNKNOWN)),
    )
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(data))
    return Summary(value=[value])


def _hyperparameter(value: Any) -> bool | float | str:
    return value if isinstance(value, (bool, int, float, str)) else "" if value is None else str(value)
