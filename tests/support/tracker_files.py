"""Readers of the files that trackers write: (name, step) -> values in the order of logging."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Values = dict[tuple[str, int], list[float]]


def of_metrics_file(folder: Path) -> Values:
    """Return the values in metrics.jsonl."""
    found: Values = {}
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        for name, value in _leaves(line):
            if name != "step":
                found.setdefault((name, line["step"]), []).append(value)
    return found


def of_tensorboard(folder: Path) -> Values:
    """Return the scalars, without the final ones, from TensorBoard's own reader."""
    events = tensorboard_events(folder)
    found: Values = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            if not tag.startswith("final/"):
                found.setdefault((tag, event.step), []).append(event.value)
    return found


def tensorboard_events(folder: Path) -> Any:
    """Return TensorBoard's reader of a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def of_mlflow(client: Any, folder: Path) -> Values:
    """Return the metrics, without the final ones, from MLflow's client."""
    run = client.get_run((folder / "mlflow_run_id").read_text().strip())
    found: Values = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            if not name.startswith("final/"):
                found.setdefault((name, metric.step), []).append(metric.value)
    return found


def of_wandb(records: list[Any]) -> Values:
    """Return the history in wandb's records, which has one row for each step."""
    found: Values = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if not name.startswith("_"):
                    found.setdefault((name, row["_step"]), []).append(value)
    return found


def wandb_records(folder: Path) -> list[Any]:
    """Return the records of the only offline session in a run's folder.

    The file is a log as LevelDB has them: blocks of 32 KiB, in each pieces of a checksum (4 bytes), a length (2), a
    kind (1: whole, 2: first, 3: middle, 4: last), and so many bytes. Seven bytes of wandb's own are ahead.
    """
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 300
    while True:  # a process of wandb's writes it, and a little after the run has ended
        records = _records(file.read_bytes())
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the user's keys and settings, and fail when anything prompts."""
    monkeypatch.chdir(tmp_path)
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # an earlier test's command line may have left its own
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-settings"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something is asked on stdin"))


def installed(logger: str) -> list[str]:
    """Return the overrides that choose a logger; skip the test where it isn't installed."""
    for module in {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy")}[logger]:
        pytest.importorskip(module)
    return [f"logger={logger}"]


def same(found: Values, wanted: Values) -> None:
    """Check that a tracker holds the expected values, each as often."""
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        finite = [min(value, sys.float_info.max) for value in values]  # as MLflow's store keeps what is infinite
        assert sorted(found[key]) == pytest.approx(sorted(finite), rel=1e-6, nan_ok=True), (
            key
        )  # TensorBoard keeps 32 bits


def _records(data: bytes) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    records, part = [], b""
    for kind, piece in _pieces(data):
        part = piece if kind in (1, 2) else part + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records.append(record)
    return records


def _pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    place, block = 7, 32768
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            return
        yield kind, data[place + 7 : place + 7 + length]
        place += 7 + length


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value
