"""A checkpoint counts only when it is whole: whatever is wrong with it is found, and the one before it is taken."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.io.checkpoint_state import STATE
from loraplus_hydra.io.checkpoints import MANIFEST, defect, newest_complete, rotate, seal
from tests.conftest import Finished


def made(folder: Path, step: int) -> Path:
    """A checkpoint as it lies on disk, with stand-ins for the Trainer's files."""
    place = folder / f"checkpoint-{step}"
    (place / "sub").mkdir(parents=True)
    (place / "adapter_model.safetensors").write_bytes(bytes(range(200)))
    (place / "optimizer.pt").write_bytes(b"state" * 50)
    (place / "sub" / "part").write_bytes(b"part")
    for name in ("scheduler.pt", "rng_state.pth"):
        (place / name).write_bytes(b"state")
    window = {"losses": [0.0], "since_step": 0, "total": 0.0, "trl": {}}
    told = {"optimizer": "x", "groups": {}, "schedule": {"is": "x", "arguments": {}}, "max_steps": step}
    told |= {"step": step, "seconds": 0.0, "metrics_bytes": 0, "window": window}
    (place / STATE).write_text(json.dumps(told))
    trainers = {"global_step": step, "epoch": 0, "max_steps": step, "num_train_epochs": 1, "total_flos": 0}
    trainers |= {"num_input_tokens_seen": 0, "log_history": [], "stateful_callbacks": {}}
    (place / "trainer_state.json").write_text(json.dumps(trainers))
    seal(place)
    return place


def change_manifest(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((place / MANIFEST).read_text())
    change(manifest["files"])
    (place / MANIFEST).write_text(json.dumps(manifest))


def add_link(place: Path) -> None:
    outside = place.parent / "outside"
    outside.write_bytes(b"part")
    (place / "sub" / "part").unlink()
    (place / "sub" / "part").symlink_to(outside)


def add_pickle(place: Path) -> None:
    (place / "adapter_model.bin").write_bytes(pickle.dumps({}))
    seal(place)


def without_weights(place: Path) -> None:
    (place / "adapter_model.safetensors").unlink()
    seal(place)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "so it is incomplete": (lambda place: (place / MANIFEST).unlink(), "so it is incomplete"),
    "cut short": (lambda place: os.truncate(place / "optimizer.pt", 10), "is 10 bytes long, not 250"),
    "another byte": (lambda place: (place / "optimizer.pt").write_bytes(b"State" + b"state" * 49), "its hash differs"),
    "file missing": (lambda place: (place / "sub" / "part").unlink(), "sub/part is missing"),
    "file too many": (lambda place: (place / "more").write_text(""), "more is not in the manifest"),
    "manifest cut": (lambda place: os.truncate(place / MANIFEST, 20), "can't be read"),
    "manifest a list": (lambda place: (place / MANIFEST).write_text("[]"), "can't be read"),
    "manifest nested": (lambda place: (place / MANIFEST).write_text("[" * 100_000), "can't be read"),
    "manifest lies": (lambda place: change_manifest(place, lambda files: files.pop("sub/part")), "not in the manifest"),
    "path out": (
        lambda place: change_manifest(place, lambda files: files.update({"../x": {"size": 1, "sha256": ""}})),
        "which is outside the folder",
    ),
    "absolute path": (
        lambda place: change_manifest(place, lambda files: files.update({"/etc/passwd": {"size": 1, "sha256": ""}})),
        "which is outside the folder",
    ),
    "link": (add_link, "is a link"),
    "pickled weights": (add_pickle, "pickle"),
    "no weights": (without_weights, "no adapter_model.safetensors"),
    "state broken": (lambda place: ((place / STATE).write_text("{"), seal(place)), "run_state.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_checkpoint_is_passed_over_for_the_one_before(fault: str, tmp_path: Path) -> None:
    older, newer = made(tmp_path, 9), made(tmp_path, 10)
    spoil, told = FAULTS[fault]
    spoil(newer)
    found, passed_over = newest_complete(tmp_path)
    assert found is not None
    assert (found.folder, found.step) == (older, 9)
    assert len(passed_over) == 1
    assert told in passed_over[0]


def test_any_changed_byte_is_seen(tmp_path: Path) -> None:
    place = made(tmp_path, 1)
    for path in sorted(place.rglob("*")):
        if not path.is_file() or path.name == MANIFEST:
            continue
        whole = path.read_bytes()
        for index in range(0, len(whole), 13):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
            assert "hash differs" in defect(place), (path, index)
        path.write_bytes(whole)
    assert defect(place) == ""


def test_without_any_whole_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "missing") == (None, ())
    (made(tmp_path, 3) / MANIFEST).unlink()
    assert newest_complete(tmp_path)[0] is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [30, 40]), (1, None, [40]), (None, None, [10, 20, 30, 40]), (2, 10, [10, 40]), (1, 20, [20, 40])],
)
def test_oldest_checkpoints_go_but_never_the_newest_or_the_best(
    keep: int | None, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in (10, 20, 30, 40):
        made(tmp_path, step)
    rotate(tmp_path, keep, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == left


def test_checkpoint_holds_the_adapter_and_no_pickled_arguments(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    run(compose(*tiny_run, "trainer.save_steps=2", "adapter=lora_embeddings"), tmp_path / "run")
    from safetensors import safe_open

    place = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    assert not (place / "training_args.bin").exists()
    with safe_open(place / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "base_layer" in name]  # noqa: SIM118


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_that_would_run_code_is_not_unpickled(
    name: str, cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    import torch

    assert cli(*tiny_run, "trainer.save_steps=2", "trainer.max_steps=4", "hydra.run.dir=run").status == 0
    place = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    torch.save(Boom(), place / name)
    seal(place)  # as somebody would who wants it to be opened
    finished = cli("resume", "run", "trainer.max_steps=8")
    assert finished.status == 1
    assert "can't be restored (UnpicklingError: Weights only load failed); name an earlier" in finished.err
    assert "Traceback" not in finished.err
    assert not (tmp_path / "executed").exists()


def test_named_checkpoint_that_does_not_count_is_refused(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    place = made(tmp_path, 2)
    os.truncate(place / "optimizer.pt", 3)
    finished = cli(*tiny_run, f"trainer.resume_from_checkpoint={place}", "hydra.run.dir=run")
    assert finished.status == 1
    assert "trainer.resume_from_checkpoint" in finished.err
    assert "is 3 bytes long, not 250" in finished.err
    assert not (tmp_path / "run").exists()
