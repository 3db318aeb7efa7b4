"""Trackers hold the numbers of metrics.jsonl, and close their sessions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra import run
from loraplus_hydra.config.plain import flat
from loraplus_hydra.io.result import read_result
from loraplus_hydra.training.hf_trainer.loraplus_mixin import LoraPlusMixin
from loraplus_hydra.training.trackers.tracker import TrackedRun, Tracker
from loraplus_hydra.training.trackers.tracking import final_metrics
from tests.conftest import Finished
from tests.support import tracker_files
from tests.support.processes import command_line, run_in_two_ranks
from tests.support.tracker_files import Values, installed, nobody_logged_in, same

pytestmark = pytest.mark.extras


__all__ = ["nobody_logged_in"]

AUTO = "trainer.resume_from_checkpoint=auto"
ENDINGS = (
    *("seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
    *("tokens_per_second", "memory_bytes", "model_flops_utilisation"),
)


def values_in(logger: str, folder: Path) -> Values:
    if logger == "tensorboard":
        return tracker_files.of_tensorboard(folder)
    if logger == "wandb":
        return tracker_files.of_wandb(tracker_files.wandb_records(folder))
    return tracker_files.of_mlflow(mlflow_client(), folder)


def mlflow_client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/outputs/mlflow.db")


def mlflow_run(folder: Path) -> Any:
    return mlflow_client().get_run((folder / "mlflow_run_id").read_text().strip())


def metrics_values(logger: str, folder: Path) -> Values:
    """Return the values in metrics.jsonl, as this logger keeps them."""
    wanted = tracker_files.of_metrics_file(folder)
    return {key: values[-1:] for key, values in wanted.items()} if logger == "wandb" else wanted


@pytest.fixture
def failing_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], pytest.MonkeyPatch]:
    """Return a function that makes training raise an error at a step, until `.undo()`."""

    def failing(step: int, error: BaseException) -> pytest.MonkeyPatch:
        original, patch = LoraPlusMixin.training_step, pytest.MonkeyPatch()

        def step_of(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step:
                raise error
            return original(self, *args, **kwargs)

        patch.setattr(LoraPlusMixin, "training_step", step_of)
        return patch

    return failing


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "mlflow"])
def test_tracker_holds_what_metrics_jsonl_has(
    logger: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "mine"
    result = run(compose(*tiny_run, *installed(logger), "task.samples=0"), folder)
    found = values_in(logger, folder)
    same(found, metrics_values(logger, folder))
    for name in ("loss", "lr/groupA", "lr/groupB", "norms/groupA/weight", "norms/groupB/update", "grad_norm"):
        assert {step for key, step in found if key == name} == {1, 2, 3, 4}
    assert {step for key, step in found if key == "eval_loss"} >= {0, 4}
    assert found["lr/groupB", 1][0] == pytest.approx(8 * found["lr/groupA", 1][0])
    CHECKS[logger](folder, result)


def check_tensorboard(folder: Path, result: Any) -> None:
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    events = tracker_files.tensorboard_events(folder)
    assert events.Scalars("final/eval_loss")[-1].value == pytest.approx(result.metrics["eval_loss"])
    texts = {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in ("run/text_summary", "status/text_summary")
    }
    assert texts == {"run/text_summary": b"runs/mine", "status/text_summary": b"ok"}
    content = events._plugin_to_tag_to_content[metadata.PLUGIN_NAME]

    def data(tag: str) -> Any:
        return plugin_data_pb2.HParamsPluginData.FromString(content[tag])

    settings = data(metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    assert settings["loraplus.ratio"].number_value == 8.0
    assert settings["model.trust_remote_code"].bool_value is False
    assert data(metadata.SESSION_END_INFO_TAG).session_end_info.status == api_pb2.STATUS_SUCCESS


def check_wandb(folder: Path, result: Any) -> None:
    records = tracker_files.wandb_records(folder)
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.display_name, run.run_group) == ((folder / "wandb_id").read_text().strip(), "runs/mine", "")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["loraplus"]["ratio"] == 8.0
    summary = {
        item.key: json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["status"] == "ok"
    assert summary["final/eval_loss"] == result.metrics["eval_loss"]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def check_mlflow(folder: Path, result: Any) -> None:
    run = mlflow_run(folder)
    assert (run.info.run_name, run.info.status, run.data.tags["status"]) == ("runs/mine", "FINISHED", "ok")
    assert run.data.params["loraplus.ratio"] == "8.0"
    assert run.data.params["optimizer._target_"] == "torch.optim.AdamW"
    assert {key: run.data.metrics[f"final/{key}"] for key in final_metrics(result)} == final_metrics(result)
    assert sorted(path.name for path in folder.parents[1].iterdir()) == ["outputs", "runs"]


CHECKS = {"tensorboard": check_tensorboard, "wandb": check_wandb, "mlflow": check_mlflow}


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "mlflow"])
def test_resumed_run_goes_on_in_the_same_place_without_doubled_steps(
    logger: str, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, failing_at: Callable[..., Any]
) -> None:
    overrides = [*tiny_run, *installed(logger), "task.samples=0", "trainer.save_steps=2", AUTO]
    folder = tmp_path / "run"
    patch = failing_at(3, RuntimeError("a fault"))
    with pytest.raises(RuntimeError, match="a fault"):
        run(compose(*overrides), folder)  # steps 1 to 3 are logged, and the checkpoint is of step 2
    patch.undo()
    assert 3 in {step for _, step in values_in(logger, folder)}
    if logger == "mlflow":
        assert mlflow_run(folder).info.status == "FAILED"
    known = {path.name: path.read_text() for path in folder.glob("*_id")}
    first = set(folder.glob("wandb/offline-run-*"))
    for place in first:  # a session is a folder of its own, and the reader takes one
        place.rename(place.with_name(f"before-{place.name}"))
    run(compose(*overrides), folder)
    assert {path.name: path.read_text() for path in folder.glob("*_id")} == known
    assert len(known) == (logger != "tensorboard")
    found, wanted = values_in(logger, folder), metrics_values(logger, folder)
    if logger == "wandb":  # an offline session of the steps behind the checkpoint, under the same id
        wanted = {key: values for key, values in wanted.items() if key[1] > 2}
    if logger == "mlflow":  # what is written there stays: of a step taken twice, the first time
        found, wanted = without_clock(found), without_clock(wanted)
        assert mlflow_run(folder).info.status == "FINISHED"
    same(found, wanted)


def without_clock(values: Values) -> Values:
    return {key: value for key, value in values.items() if key[0] not in ENDINGS}


@pytest.mark.parametrize(
    ("error", "status", "killed"),
    [(RuntimeError("a fault"), "failed", "FAILED"), (KeyboardInterrupt(), "interrupted", "KILLED")],
)
def test_run_that_does_not_end_well_says_so_and_leaves_nothing_open(
    error: BaseException,
    status: str,
    killed: str,
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
    failing_at: Callable[..., Any],
) -> None:
    for logger in ("mlflow", "wandb", "tensorboard"):
        overrides = installed(logger)
        patch = failing_at(2, error)
        with pytest.raises(type(error)):
            run(compose(*tiny_run, "task.samples=0", *overrides), tmp_path / logger)
        patch.undo()
    import mlflow
    import wandb

    assert mlflow.active_run() is None
    assert wandb.run is None
    stored = mlflow_run(tmp_path / "mlflow")
    assert (stored.info.status, stored.data.tags["status"]) == (killed, status)
    codes = [one.exit.exit_code for one in tracker_files.wandb_records(tmp_path / "wandb") if one.HasField("exit")]
    assert codes == [1]
    events = tracker_files.tensorboard_events(tmp_path / "tensorboard")
    assert events.Tensors("status/text_summary")[-1].tensor_proto.string_val[0] == status.encode()


def test_jobs_of_a_sweep_are_runs_of_one_group_also_when_one_fails(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    installed("wandb")
    ended = cli(
        *("-m", *tiny_run, *installed("mlflow"), "task.samples=0", "sweep.name=trial"),
        "optimizer.lr=1e-3,1e30,2e-3",
        "loraplus.ratio=2",
    )
    assert ended.status == 1
    jobs = sorted((tmp_path / "outputs" / "sweeps" / "trial").glob("*/result.json"))
    runs = {job.parent.name: mlflow_run(job.parent) for job in jobs}
    assert len(runs) == 3
    assert sorted(run.info.status for run in runs.values()) == ["FAILED", "FINISHED", "FINISHED"]
    assert all(run.data.tags["sweep"] == "trial" and run.info.run_name == name for name, run in runs.items())
    for job in jobs:
        same(tracker_files.of_mlflow(mlflow_client(), job.parent), tracker_files.of_metrics_file(job.parent))


def test_only_the_first_of_several_processes_tracks(
    tiny_run: list[str], tmp_path: Path, compose: Callable[..., Any]
) -> None:
    shared = [*tiny_run, *installed("tensorboard"), "trainer=cpu", "trainer.max_steps=3", "trainer.logging_steps=1"]
    shared += ["task.samples=0"]
    two = [*shared, "trainer.per_device_train_batch_size=2", f"hydra.run.dir={tmp_path / 'two'}"]
    ended = run_in_two_ranks(command_line, *two, folder=tmp_path)
    assert ended.status == 0, ended.out[-3000:]
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    same(tracker_files.of_tensorboard(tmp_path / "two"), tracker_files.of_metrics_file(tmp_path / "two"))
    run(compose(*shared), tmp_path / "one")
    both = [tracker_files.of_metrics_file(tmp_path / name) for name in ("one", "two")]
    for key in both[0]:
        if key[0].startswith("norms/"):
            assert both[1][key] == pytest.approx(both[0][key], rel=1e-3), key


class Notes(Tracker):
    """A user's own tracker, which can fail."""

    made: list[Notes] = []  # noqa: RUF012

    def __init__(self, fails: str = "", address: str = "") -> None:
        self.fails = fails
        self.address = address
        self.calls: list[tuple[str, Any]] = []
        Notes.made.append(self)

    def _note(self, name: str, what: Any) -> None:
        self.calls.append((name, what))
        if name == self.fails:
            raise OSError("no room\non the disk")

    def start(self, run: TrackedRun) -> None:
        self._note("start", run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note("log", (step, dict(values)))

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        self._note("finish", (status, dict(metrics)))


@pytest.mark.parametrize("fails", ["", "start", "log", "finish"])
def test_own_tracker_works_and_one_that_fails_is_told_once(
    fails: str, cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    Notes.made.clear()
    own = ["logger._target_=tests.training.test_tracked_runs.Notes", f"+logger.fails={fails}"]
    ended = cli(*tiny_run, "task.samples=0", *own, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.status == 0
    assert ended.out.count("the run continues without its logger") == bool(fails)
    assert ("which failed: OSError: no room. metrics.jsonl has everything" in ended.out) == bool(fails)
    (notes,) = Notes.made
    result = read_result(tmp_path / "run")
    assert result is not None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    wanted = {"start": 0, "log": 1}.get(fails, len(lines))
    assert [name for name, _ in notes.calls] == ["start", *["log"] * wanted, "finish"]
    run = notes.calls[0][1]
    assert (run.name, run.group, run.resumed_at, run.config["loraplus"]["ratio"]) == ("run", None, None, 8.0)
    assert notes.calls[-1][1] == ("ok", final_metrics(result))


def test_trackers_get_the_config_without_credentials(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    Notes.made.clear()
    own = ["logger._target_=tests.training.test_tracked_runs.Notes"]
    address = "postgresql://me:s3cret@db.acme.com/runs"
    ended = cli(*tiny_run, "task.samples=0", *own, f"+logger.address={address}", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.status == 0, ended.err
    (notes,) = Notes.made
    assert notes.address == address, "the tracker itself logs in with them"
    assert notes.calls[0][1].config["logger"]["address"] == "postgresql://db.acme.com/runs"
    log = "".join(path.read_text() for path in (tmp_path / "run").glob("*.log"))
    assert "postgresql://db.acme.com/runs" in log
    assert "s3cret" not in ended.out + ended.err + log
    assert address in (tmp_path / "run" / "config.yaml").read_text(), "resume needs them"


names = st.text("abc", min_size=1, max_size=3)


@given(st.dictionaries(names, st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3))))
def test_flat_names_lead_back_to_the_values(nested: dict[str, Any]) -> None:
    for name, value in flat(nested, "/").items():
        found: Any = nested
        for part in name.split("/"):
            found = found[part]
        assert found == value
        assert not isinstance(found, dict) or not found
