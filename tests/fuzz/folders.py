"""Trials of folders: a mutated run, adapter or sweep goes through one of the commands that open it.

As a script it runs the trials (see `forked`).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.forked import Ended, command, snapshot, trials
from tests.fuzz.mutations import mutate
from tests.support.forking import differences

GIGABYTE = 2**30
SHORT = ("trainer.max_steps=4", "trainer.save_steps=2", "trainer.save_total_limit=5", "task.samples=0")
RUN = ("config.yaml", "result.json", "adapter", "adapter", "adapter", "adapter")
CHECKPOINT = ("checkpoints", "checkpoints", "checkpoints", "config.yaml", ".hydra", "metrics.jsonl", "result.json")
SWEEP = ("config.yaml", "result.json", "metrics.jsonl", "param_groups.json", ".hydra", "sweep.json")
# command -> the folder it opens, the arguments, the parts it reads
COMMANDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "predict": ("good", ("predict", "PLACE", "text=say one", "max_new_tokens=4"), RUN),
    "evaluate": ("good", ("evaluate", "PLACE"), RUN),
    "export": ("good", ("export", "PLACE", "to=written"), RUN),
    "export, adapter": ("good", ("export", "PLACE", "to=written", "merge=false"), RUN),
    "resume": ("stopped", ("resume", "PLACE"), CHECKPOINT),
    "report": ("sweep", ("report", "PLACE"), SWEEP),
    "train on": ("good", (), ("adapter",)),  # with the run's overrides
}


class Trials:
    """The unchanged folders, and what each command does with them."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder, self.overrides = folder, [*overrides, *SHORT]
        self.good, self.stopped, self.sweep = folder / "good", folder / "stopped", folder / "sweep"
        self.guard, self.work = folder / "guard", folder / "work"
        _succeed([*self.overrides, f"hydra.run.dir={self.good}"], folder)
        shutil.copytree(self.good, self.stopped)
        for name in ("result.json", "train.png", "adapter", "checkpoints/checkpoint-4"):
            place = self.stopped / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        _succeed(
            ["-m", *self.overrides, "seed=1,2", f"hydra.sweep.dir={self.sweep}", "trainer.save_strategy=no"], folder
        )
        self._make_guard()
        self.unchanged = {name: self._ended(name, lambda _: []) for name in COMMANDS}
        for name, (ended, _, _) in self.unchanged.items():
            assert ended.status == 0, f"{name}: {ended.output}"

    def one(self, number: int) -> dict[str, Any]:
        """Run one trial: which command, what was changed, and what is wrong with how it ended."""
        dice = random.Random(number)
        name = list(COMMANDS)[number % len(COMMANDS)]
        done: list[str] = []
        ended, fault, other = self._ended(
            name, lambda place: done.extend(mutate(place, self.guard, dice, COMMANDS[name][2]))
        )
        unchanged = self.unchanged[name][0]
        fault = ended.fault() or fault
        if not fault and ended.memory > unchanged.memory + GIGABYTE:
            fault = f"it took {(ended.memory - unchanged.memory) / GIGABYTE:.1f} GB more than the unchanged folder"
        if not fault and "memory" in ended.output.lower().replace("peak_memory", ""):
            fault = f"it ran out of memory: {ended.output[-500:]}"
        seen = {"command": name, "done": done, "status": ended.status, "seconds": round(ended.seconds, 1)}
        worked = {"other": other} if ended.status == 0 and other else {}
        message = ended.output.strip()[-300:] if ended.status else ""
        return seen | worked | {"message": message, "fault": fault}

    def _ended(self, name: str, change: Callable[[Path], Any]) -> tuple[Ended, str, str]:
        """Run a command on a changed copy: how it ended, what it did outside, and in what its results differ."""
        # Not shutil.rmtree, which recurses: some of these folders are a thousand levels deep.
        subprocess.run(["rm", "-rf", self.work, self.guard / "folders"], check=True)
        kind, arguments, _ = COMMANDS[name]
        place = self.work / "trial"
        self.work.mkdir()
        (self.folder / "tmp").mkdir(exist_ok=True)
        shutil.copytree(self.folder / kind, place)
        (self.guard / "folders").mkdir()
        change(place)
        before, sources = snapshot(self.guard), snapshot(self.folder / "good")
        words = [word.replace("PLACE", str(place)) for word in arguments]
        if name == "train on":
            words = [
                *self.overrides,
                "adapter=existing",
                f"adapter.path={place}",
                "hydra.run.dir=new",
                "trainer.max_steps=1",
            ]
        ended = command(words, self.work)
        fault = ""
        if snapshot(self.guard) != before or snapshot(self.folder / "good") != sources:
            fault = f"something outside the folder changed: {_first_change(before, snapshot(self.guard))}"
        elif left := sorted(path.name for path in (self.folder / "tmp").iterdir()):
            fault = f"left in the temporary folder: {left}"
            shutil.rmtree(self.folder / "tmp")
        return ended, fault, self._other(name, ended, place) if ended.status == 0 else ""

    def _other(self, name: str, ended: Ended, place: Path) -> str:
        """In what a command's results differ from those on the unchanged folder."""
        if not hasattr(self, "unchanged"):
            return ""
        if name in ("predict", "evaluate"):
            return "" if ended.output == self.unchanged[name][0].output else ended.output[-300:]
        if name == "resume":
            try:
                return ", ".join(differences(place, self.good))
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        return ""

    def _make_guard(self) -> None:
        self.guard.mkdir()
        (self.guard / "file.txt").write_text("precious")
        (self.guard / "home").mkdir()
        for name in ("config.json", "result.json", "metrics.jsonl", "adapter_model.safetensors", "config.yaml"):
            (self.guard / name).write_text("{}\n")
        os.environ["HOME"] = str(self.guard / "home")
        tempfile.tempdir = str(self.folder / "tmp")


def _first_change(before: dict[str, Any], after: dict[str, Any]) -> str:
    return next((name for name in before.keys() | after.keys() if before.get(name) != after.get(name)), "the run")


def _succeed(arguments: list[str], folder: Path) -> None:
    (folder / "first").mkdir(exist_ok=True)
    ended = command(arguments, folder / "first")
    assert ended.status == 0, ended.output


if __name__ == "__main__":
    trials(lambda folder, overrides: Trials(folder, overrides).one)
