"""What a checkpoint must hold to be gone on from: whatever would be lost or made up without a word keeps it out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.errors import UserError
from loraplus_hydra.io.checkpoint_state import STATE
from loraplus_hydra.io.checkpoints import in_order, newest_complete, open_checkpoint, rotate, seal, unseal
from loraplus_hydra.models.adapter_files import refuse_other_tensors
from tests.conftest import Finished
from tests.runs.conftest import AUTO
from tests.support.forking import differences

ROOT = Path(__file__).resolve().parents[2]
B8 = ("trainer.max_steps=8", "trainer.save_steps=2", "trainer.save_total_limit=null")
TRAINERS = "trainer_state.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs by name, each made once."""
    return {"": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def checkpoints(
    trained: dict[str, Path], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> Callable[..., Path]:
    """A copy of the checkpoints/ of a run of eight steps that is made once."""

    def copied(*overrides: str) -> Path:
        key = " ".join(overrides) or "plain"
        if key not in trained:
            trained[key] = trained[""] / str(len(trained))
            run(compose(*tiny_run, *B8, *overrides), trained[key])
        return Path(shutil.copytree(trained[key], tmp_path / "run")) / "checkpoints"

    return copied


def changed(place: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a checkpoint, and seal it again."""
    told = json.loads((place / name).read_text())
    change(told)
    (place / name).write_text(json.dumps(told))
    seal(place)


def test_checkpoints_without_the_optimizers_state_are_refused(
    cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    finished = cli("check", *tiny_run, "+trainer.save_only_model=true")
    assert finished.status == 1
    assert "trainer.save_only_model: its checkpoints have no optimizer state" in finished.err
    assert cli("check", *tiny_run, "+trainer.save_only_model=false").status == 0


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINERS])
def test_checkpoint_without_a_part_of_the_trainers_state_does_not_count(
    name: str, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints()
    newest = folder / "checkpoint-8"
    (newest / name).unlink()
    seal(newest)
    with pytest.raises(ValueError, match=f"it has no {name}"):
        open_checkpoint(newest)
    found, _ = newest_complete(folder)
    assert found is not None
    assert found.step == 6


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_state_in_shards_counts_and_one_without_the_schedule_does_not(
    name: str, checkpoints: Callable[..., Path]
) -> None:
    newest = checkpoints() / "checkpoint-8"
    (newest / name).unlink()
    (newest / "optimizer_0").mkdir()
    (newest / "optimizer_0" / ".metadata").write_bytes(b"")
    seal(newest)
    if name == "optimizer.pt":
        assert open_checkpoint(newest).step == 8
    else:
        with pytest.raises(ValueError, match=r"it has no scheduler\.pt"):
            open_checkpoint(newest)


def test_each_process_has_its_random_state(checkpoints: Callable[..., Path]) -> None:
    newest = checkpoints() / "checkpoint-8"
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    changed(newest, STATE, lambda told: told["window"].update(losses=[0.0, 0.0]))
    with pytest.raises(ValueError, match=r"it has no rng_state_1\.pth"):
        open_checkpoint(newest)
    shutil.copy(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
    seal(newest)
    assert open_checkpoint(newest).step == 8


NOT_AS_WRITTEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "no metrics_bytes": (STATE, lambda told: told.pop("metrics_bytes")),
    "metrics_bytes below 0": (STATE, lambda told: told.update(metrics_bytes=-5)),
    "metrics_bytes true": (STATE, lambda told: told.update(metrics_bytes=True)),
    "no window": (STATE, lambda told: told.pop("window")),
    "window a list": (STATE, lambda told: told.update(window=[])),
    "no losses": (STATE, lambda told: told["window"].update(losses=[])),
    "losses text": (STATE, lambda told: told["window"].update(losses=["x"])),
    "losses not finite": (STATE, lambda told: told["window"].update(losses=[float("nan")])),
    "total too large": (STATE, lambda told: told["window"].update(total=10**400)),
    "since a later step": (STATE, lambda told: told["window"].update(since_step=9)),
    "TRL's text": (STATE, lambda told: told["window"].update(trl={"_metrics": "x"})),
    "seconds text": (STATE, lambda told: told.update(seconds="x")),
    "another step": (STATE, lambda told: told.update(step=7)),
    "no groups": (STATE, lambda told: told.pop("groups")),
    "groups' settings": (STATE, lambda told: [group.pop("settings") for group in told["groups"].values()]),
    "schedule": (STATE, lambda told: told.update(schedule="x")),
    "the Trainer's step": (TRAINERS, lambda told: told.update(global_step=6)),
    "an unknown key": (TRAINERS, lambda told: told.update(os="x")),
    "epoch text": (TRAINERS, lambda told: told.update(epoch="x")),
    "history text": (TRAINERS, lambda told: told.update(log_history=["x"])),
    "history without steps": (TRAINERS, lambda told: told.update(log_history=[{"loss": 1}])),
    "callbacks": (TRAINERS, lambda told: told.update(stateful_callbacks={"EarlyStoppingCallback": 1})),
    "saves": (TRAINERS, lambda told: told.update(save_steps="x")),
    "the best": (TRAINERS, lambda told: told.update(best_model_checkpoint=1)),
}


@pytest.mark.parametrize("kind", NOT_AS_WRITTEN)
def test_state_that_is_not_as_written_is_passed_over(kind: str, checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints()
    changed(folder / "checkpoint-8", *NOT_AS_WRITTEN[kind])
    found, _ = newest_complete(folder)
    assert found is not None
    assert found.step == 6


@pytest.mark.parametrize("name", [STATE, TRAINERS])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", "\0", '{"step": ' + "9" * 5000 + "}"])
def test_state_that_is_none_is_passed_over(text: str, name: str, checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints()
    (folder / "checkpoint-8" / name).write_text(text)
    seal(folder / "checkpoint-8")
    found, _ = newest_complete(folder)
    assert found is not None
    assert found.step == 6


def test_log_window_sets_nothing_but_trls_own(
    stopped: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loraplus_hydra.training.hf_trainer.checkpoint_callback import CheckpointCallback

    run(compose(*tiny_run, *B8), tmp_path / "unbroken")
    stopped(tmp_path / "run", *tiny_run, *B8, at=6)
    place = tmp_path / "run" / "checkpoints" / "checkpoint-6"
    changed(place, STATE, lambda told: told["window"]["trl"].update({"args": 1, "model": {"a": [1]}, "unheard": 2}))
    seen = []
    begin = CheckpointCallback.on_train_begin

    def on_train_begin(self: CheckpointCallback, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        seen.append(hasattr(self.trainer, "unheard"))

    monkeypatch.setattr(CheckpointCallback, "on_train_begin", on_train_begin)
    run(compose(*tiny_run, *B8, AUTO), tmp_path / "run")
    assert seen == [False]
    assert differences(tmp_path / "run", tmp_path / "unbroken") == []


@pytest.mark.parametrize("at", [10, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 3, 7, 9, 14))])
def test_order_by_length_is_gone_on_with(
    at: int, stopped: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    # Ten steps an epoch: the last of them is stopped in the second.
    grouped = (*tiny_run, "trainer.max_steps=15", "trainer.save_steps=50")
    grouped += ("+trainer.train_sampling_strategy=group_by_length",)
    run(compose(*grouped), tmp_path / "unbroken")
    stopped(tmp_path / "run", *grouped, at=at)
    assert run(compose(*grouped, AUTO), tmp_path / "run").resumed_at == [at]
    assert differences(tmp_path / "run", tmp_path / "unbroken") == []


def test_order_by_length_is_another_in_each_epoch() -> None:
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from loraplus_hydra.training.hf_trainer.loraplus_mixin import _OrderOfEpoch

    behind = [0.0]
    order = _OrderOfEpoch(LengthGroupedSampler(2, lengths=list(range(40))), 3, lambda: behind[0])
    first = list(order)
    behind[0] = 0.9
    assert list(order) == first
    behind[0] = 1.0
    assert list(order) != first
    assert sorted(order) == list(range(40))


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "missing": (lambda tensors: dict(list(tensors.items())[1:]), "is missing in the adapter"),
    "unknown": (lambda tensors: {**tensors, "x.y": next(iter(tensors.values())).clone()}, "x.y is"),
    "none": (lambda _: {}, "is missing in the adapter"),
    "wrong shapes": (lambda tensors: {n: t[:-1].contiguous() for n, t in tensors.items()}, "in this run"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_of_another_adapter_are_told(
    kind: str, checkpoints: Callable[..., Path], compose: Callable[..., Any], tiny_run: list[str]
) -> None:
    from safetensors.torch import load, save_file

    from loraplus_hydra.training.prepare import plan_on_meta

    change, told = REFUSED[kind]
    place = checkpoints() / "checkpoint-8"
    adapted = plan_on_meta(compose(*tiny_run))[0]
    refuse_other_tensors(place, adapted)
    file = place / "adapter_model.safetensors"
    save_file(change(load(file.read_bytes())), file, {"format": "pt"})
    with pytest.raises(UserError, match=told):
        refuse_other_tensors(place, adapted)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="can't be read"):
        refuse_other_tensors(place, adapted)


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter=dora",),
        pytest.param(("adapter=pissa",), marks=pytest.mark.slow),
        pytest.param(("adapter=vera", "loraplus=roles"), marks=pytest.mark.slow),
        ("adapter=adalora", "adapter.tinit=1", "adapter.tfinal=1"),
        ("adapter=lora_embeddings",),
        ("+adapter.modules_to_save=[lm_head]",),
        ("model.add_tokens=[new_a,new_b]",),
    ],
    ids=" ".join,
)
def test_own_weights_are_not_refused(
    overrides: tuple[str, ...], checkpoints: Callable[..., Path], compose: Callable[..., Any], tiny_run: list[str]
) -> None:
    from loraplus_hydra.check import check

    config = compose(*tiny_run, *B8, *overrides)
    folder = checkpoints(*overrides)
    adapted = check(config).model
    for step in (2, 8):
        refuse_other_tensors(folder / f"checkpoint-{step}", adapted)


def test_link_is_no_checkpoint_and_what_it_leads_to_is_left_alone(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints()
    elsewhere = folder.parent.parent / "elsewhere" / "checkpoint-8"
    elsewhere.parent.mkdir()
    (folder / "checkpoint-8").rename(elsewhere)
    link = folder / "checkpoint-8"
    link.symlink_to(elsewhere)
    found, _ = newest_complete(folder)
    assert found is not None
    assert found.step == 6
    assert link not in in_order(folder)
    with pytest.raises(ValueError, match="is a link"):
        open_checkpoint(link)
    rotate(folder, 1, None)
    assert [path.name for path in in_order(folder)] == ["checkpoint-6"]
    unseal(link)
    assert not link.is_symlink()
    assert open_checkpoint(elsewhere).step == 8
