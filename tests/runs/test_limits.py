"""The limits of the machine and of numbers: the right message, the last good state intact, nothing half written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra import run
from loraplus_hydra.io.checkpoints import newest_complete
from loraplus_hydra.runs.limits import is_disk_full, is_out_of_memory
from loraplus_hydra.training.hf_trainer.loraplus_mixin import LoraPlusMixin, NotFiniteError
from tests.conftest import Finished
from tests.support.forking import differences

AUTO = "trainer.resume_from_checkpoint=auto"


@pytest.fixture
def spoiled() -> Iterator[Callable[..., Any]]:
    """From step `at` on, do `what` to the model before the batch is seen, until the patch is undone."""
    with pytest.MonkeyPatch.context() as patch:

        def spoil(at: int, what: Callable[[Any], None]) -> pytest.MonkeyPatch:
            original = LoraPlusMixin.training_step

            def step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
                if self.state.global_step == at - 1:
                    what(model)
                return original(self, model, *args, **kwargs)

            patch.setattr(LoraPlusMixin, "training_step", step)
            return patch

        yield spoil


def test_gradient_that_is_not_finite_stops_before_its_step(
    spoiled: Callable[..., Any], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, "trainer.save_steps=2", "trainer.max_steps=6"]
    run(compose(*overrides), tmp_path / "unbroken")

    def infinite(model: Any) -> None:  # the loss stays finite
        weight = next(p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name)
        weight.register_hook(lambda gradient: gradient * float("inf"))

    patch = spoiled(5, infinite)
    with pytest.raises(NotFiniteError, match=r"the gradient's norm is (inf|nan) at step 5\."):
        run(compose(*overrides), tmp_path / "run")
    patch.undo()
    checkpoint, _ = newest_complete(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 4
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["error"]["type"], result["steps"]) == ("failed", "NotFiniteError", 4)
    assert not (tmp_path / "run" / "adapter").exists()
    run(compose(*overrides, AUTO), tmp_path / "run")
    assert differences(tmp_path / "run", tmp_path / "unbroken") == []


def test_loss_that_is_not_finite_names_step_batch_and_row(
    spoiled: Callable[..., Any], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    def not_a_number(model: Any) -> None:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "down_proj.lora_A" in name).fill_(float("nan"))

    patch = spoiled(3, not_a_number)
    with pytest.raises(
        NotFiniteError, match=r"the loss is nan at step 3, batch 1 of its 2, in the batch that begins 'say"
    ):
        run(compose(*tiny_run, "trainer.gradient_accumulation_steps=2"), tmp_path / "run")
    patch.undo()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_says_what_to_change(
    error: Exception,
    spoiled: Callable[..., Any],
    cli: Callable[..., Finished],
    tiny_run: list[str],
) -> None:
    def exhausted(model: Any) -> None:
        raise error

    patch = spoiled(2, exhausted)
    finished = cli(*tiny_run, "hydra.run.dir=run")
    patch.undo()
    assert finished.status == 1
    for told in (
        "out of memory",
        "trainer.per_device_train_batch_size=2 trainer.gradient_accumulation_steps=2",
        "trainer.activation_checkpointing=true",
        "quantization=nf4",
        "optimizer=adamw8bit",
        "MiB by the estimate of `inspect`",
    ):
        assert told in finished.err, finished.err
    assert "Traceback" not in finished.err


def test_errors_of_limits_are_told_apart() -> None:
    assert is_disk_full(OSError(28, "No space left on device"))
    assert not is_disk_full(OSError(2, "No such file"))
    assert not is_out_of_memory(RuntimeError("shapes don't match"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system isn't allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_full_disk_leaves_the_last_good_checkpoint(
    small_disk: Path, cli: Callable[..., Finished], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    # Each checkpoint takes half a MiB, of which none is removed.
    overrides = [*tiny_run, "trainer.save_steps=1", "trainer.max_steps=12", "trainer.save_total_limit=null"]
    overrides.append("adapter.r=64")
    finished = cli(*overrides, f"hydra.run.dir={small_disk}/run")
    assert finished.status == 1
    assert "the disk is full" in finished.err, finished.err
    assert f"resume {small_disk}/run" in finished.err
    assert "Traceback" not in finished.err
    checkpoint, _ = newest_complete(small_disk / "run" / "checkpoints")
    assert checkpoint is not None
    assert 1 <= checkpoint.step < 12
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)  # room is made
    finished = cli("resume", f"{small_disk}/run")
    assert finished.status == 0, finished.err
    run(compose(*overrides), tmp_path / "unbroken")
    assert differences(small_disk / "run", tmp_path / "unbroken") == []


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_output_that_cannot_be_written_is_found_before_training(
    small_disk: Path, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    finished = cli(*tiny_run, f"hydra.run.dir={small_disk}/run")
    assert finished.status == 1
    assert f"hydra.run.dir: {small_disk} can't be written" in finished.err
    assert "Checking" not in finished.out


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_run_that_can_no_longer_be_written_is_found_before_it_goes_on(
    small_disk: Path, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    folder = f"{small_disk}/run"
    command = [*tiny_run, "trainer.save_steps=2", f"hydra.run.dir={folder}"]
    assert cli(*command).status == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    resumed = cli("resume", folder, "trainer.max_steps=6")
    assert f"run: {folder} can't be written" in resumed.err
    again = cli(*command, "trainer.max_steps=6", "trainer.resume_from_checkpoint=auto")
    assert f"hydra.run.dir: {folder} can't be written" in again.err
    assert (resumed.status, again.status) == (1, 1)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_output_where_no_folder_can_be_made_is_found_before_training(
    cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    for key, flags in (("hydra.run.dir", ()), ("hydra.sweep.dir", ("-m", "seed=1,2"))):
        finished = cli(*tiny_run, *flags, f"{key}=/proc/run")
        assert finished.status == 1
        assert f"{key}: /proc can't be written" in finished.err


def test_output_below_a_file_is_found_before_training(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    finished = cli(*tiny_run, "hydra.run.dir=file/run")
    assert finished.status == 1
    assert "hydra.run.dir: 'file/run' can't be a folder" in finished.err


def test_folder_that_is_removed_on_the_way_is_told(
    spoiled: Callable[..., Any], cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    patch = spoiled(2, lambda _: shutil.rmtree(tmp_path / "run"))
    finished = cli(*tiny_run, "hydra.run.dir=run", "trainer.save_steps=1")
    patch.undo()
    assert finished.status == 1
    assert "has been removed" in finished.err, finished.err
    assert "Traceback" not in finished.err


def test_failed_run_is_told_in_our_words_alone_and_in_its_log(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    finished = cli(*tiny_run, "optimizer.lr=1e30", "trainer.eval_strategy=no", "hydra.run.dir=run")
    assert finished.status == 1
    errors = [line for line in finished.err.splitlines() if "Error" in line]
    assert len(errors) == 1, finished.err
    assert errors[0].startswith(("Error: the loss is ", "Error: the gradient's norm is "))
    assert errors[0] in (tmp_path / "run" / "loraplus_hydra.log").read_text()
