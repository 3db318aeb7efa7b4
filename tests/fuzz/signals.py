"""Trials of signals: one at a random moment of a command, then whatever is left is continued and compared.

As a script it runs the trials (see `forked`). Moments are measured in the command's processor time, so that a busy
machine doesn't move them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.forked import UNEXPECTED, Ended, command, trials
from tests.support.forking import again, differences, lines, start, unfinished_checkpoint, unreadable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)
SHORT = (
    *("trainer.max_steps=9", "trainer.logging_steps=2", "trainer.save_steps=3", "trainer.eval_steps=4"),
    *("trainer.per_device_eval_batch_size=1", "adapter.lora_dropout=0.1", "task.samples=1", "task.sample_tokens=4"),
)
KEPT = "trainer.save_total_limit=null"
SWEPT = ("-m", "seed=1,2,3", "trainer.max_steps=3", "trainer.save_steps=2")
SEARCH = ("hparams_search=optuna", "hydra.sweeper.n_trials=3", "trainer.max_steps=1", "trainer.save_strategy=no")
_TAIL = 0.3  # seconds of processor time in which a command ends after its last look for signals
_PATIENCE = 240  # seconds
_HAS_JOBLIB = importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is not None
_HAS_OPTUNA = importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is not None


@dataclass
class Signalled:
    """How a command ended that got a signal; `sent` is False if it had ended before."""

    ended: Ended
    sent: bool
    after: float  # seconds of processor time from the signal to the end
    which: signal.Signals


class Trials:
    """The unbroken results, and a scenario a kind of command."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder, self.log = folder, folder / "log"
        self.work = folder / "work"
        self.run = [*overrides, *SHORT]
        self.unbroken, self.stopped, self.sweep = folder / "unbroken", folder / "stopped", folder / "sweep"
        self.seconds: dict[str, float] = {}  # of processor time that the unbroken commands take
        self._time("run", [*self.run, KEPT, f"hydra.run.dir={self.unbroken}"])
        shutil.copytree(self.unbroken, self.stopped)
        for name in ("result.json", "train.png", "adapter", "checkpoints/checkpoint-6", "checkpoints/checkpoint-9"):
            place = self.stopped / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        self._time("sweep", [*self.run, KEPT, *SWEPT, f"hydra.sweep.dir={self.sweep}"])
        self.texts = folder / "texts.txt"
        self.texts.write_text("say one\nsay two\nsay three\n" * 4)
        for name in ("predict", "evaluate", "export", "report"):
            self._time(name, self._words(name, folder))
        self.scenarios: list[Callable[[str, random.Random], dict[str, Any]]] = [
            *(self._broken_run, self._broken_resume, self._broken_save, self._broken_evaluation, self._broken_sweep),
            *(self._broken_command, self._broken_run, self._broken_resume, self._broken_save, self._broken_command),
        ]
        if _HAS_OPTUNA:
            self.scenarios.append(self._broken_search)

    def one(self, number: int) -> dict[str, Any]:
        """Run one trial and say what is wrong with it; every fiftieth in processes that are not forked."""
        dice = random.Random(number)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.log.unlink(missing_ok=True)
        if number % 50 == 49 and _HAS_JOBLIB:
            return self._workers(number, dice)
        scenario = self.scenarios[number % len(self.scenarios)]
        seen = scenario("", dice)
        return {"scenario": scenario.__name__.removeprefix("_broken_"), **seen}

    def _broken_run(self, name: str, dice: random.Random) -> dict[str, Any]:
        place = self.work / "run"
        words = [*self.run, KEPT, f"hydra.run.dir={place}"]
        return self._continued(self._signalled(words, dice, self._at(dice, self.seconds["run"])), place, words)

    def _broken_resume(self, name: str, dice: random.Random) -> dict[str, Any]:
        place = self.work / "run"
        shutil.copytree(self.stopped, place)
        return self._continued(
            self._signalled(["resume", str(place)], dice, self._at(dice, self.seconds["run"])), place, self.run
        )

    def _broken_save(self, name: str, dice: random.Random) -> dict[str, Any]:
        place, nth = self.work / "run", dice.randint(1, 3)
        words = [*self.run, KEPT, f"hydra.run.dir={place}"]

        def in_save(pid: int) -> bool:
            begun = len(list((place / "checkpoints").glob("checkpoint-*")))
            return begun >= nth and unfinished_checkpoint(place)

        return self._continued(self._signalled(words, dice, in_save, dice.uniform(0, 0.02)), place, words)

    def _broken_evaluation(self, name: str, dice: random.Random) -> dict[str, Any]:
        place, step = self.work / "run", dice.choice((0, 4, 8))
        words = [*self.run, KEPT, f"hydra.run.dir={place}"]

        def evaluating(pid: int) -> bool:
            if step == 0:
                return (place / "param_groups.json").exists()
            logged = lines(place) if (place / "metrics.jsonl").exists() else []
            return bool(logged) and logged[-1].get("step") == step and "loss" in logged[-1]

        return self._continued(self._signalled(words, dice, evaluating, dice.uniform(0, 0.05)), place, words)

    def _broken_sweep(self, name: str, dice: random.Random, *further: str) -> dict[str, Any]:
        place = self.work / "sweep"
        words = [*self.run, KEPT, *SWEPT, f"hydra.sweep.dir={place}"]
        broken = self._signalled(words, dice, self._at(dice, self.seconds["sweep"]))
        return self._sweep_again(broken, place, words)

    def _sweep_again(self, broken: Signalled, place: Path, words: list[str]) -> dict[str, Any]:
        faults = self._faults(broken, place)
        ended = command(words, self.work)
        jobs = sorted(path.name for path in self.sweep.iterdir() if path.is_dir())
        if ended.status:
            faults.append(f"the sweep given again: {ended.status}: {ended.output[-800:]}")
        else:
            faults += [f"{job}: {what}" for job in jobs for what in differences(place / job, self.sweep / job)]
        return self._seen(broken, faults)

    def _broken_search(self, name: str, dice: random.Random) -> dict[str, Any]:
        import optuna

        place = self.work / "search"
        words = [
            *(word for word in self.run if not word.startswith("optimizer.lr")),
            *SEARCH,
            f"hydra.sweep.dir={place}",
        ]
        broken = self._signalled(words, dice, self._at(dice, self.seconds["sweep"]))
        faults = self._faults(broken, place)
        ended = command(words, self.work)
        if ended.status:
            return self._seen(broken, [*faults, f"the search given again: {ended.status}: {ended.output[-800:]}"])
        found = optuna.load_study(study_name="loraplus", storage=f"sqlite:///{place / 'study.db'}").trials
        states = [trial.state.name for trial in found]
        if states.count("COMPLETE") != 3 or "RUNNING" in states:
            faults.append(f"trials: {states}")
        return self._seen(broken, faults)

    def _broken_command(self, name: str, dice: random.Random) -> dict[str, Any]:
        """Stop evaluate, export, predict or report: it wrote all or nothing, and given again it writes the same."""
        name = dice.choice(("predict", "evaluate", "export", "report"))
        shutil.copytree(self.sweep, self.work / "sweep")
        words = self._words(name, self.work)
        for each in ("report.html", "results.csv"):
            (self.work / "sweep" / each).unlink()
        broken = self._signalled(words, dice, self._at(dice, self.seconds[name]))
        faults = self._faults(broken, self.work)
        target = {"export": "exported", "report": "sweep/results.csv"}.get(name, f"{name}.json")
        place = self.work / target
        written = place.is_dir() or (place.is_file() and place.stat().st_size > 0)  # an empty file reserves the name
        if written and name != "report":
            faults += self._other(target)
        if not (written and name == "export"):
            (self.work / target).unlink(missing_ok=True)
            ended = command(words, self.work)
            faults += [f"given again: {ended.output[-800:]}"] if ended.status else self._other(target)
        return {"name": name, **self._seen(broken, faults)}

    def _words(self, name: str, folder: Path) -> list[str]:
        return {
            "predict": [
                "predict",
                str(self.unbroken),
                f"file={self.texts}",
                f"out={folder}/predict.json",
                "max_new_tokens=8",
            ],
            "evaluate": ["evaluate", str(self.unbroken), f"out={folder}/evaluate.json"],
            "export": ["export", str(self.unbroken), f"to={folder}/exported"],
            "report": ["report", f"{folder}/sweep"],
        }[name]

    def _other(self, target: str) -> list[str]:
        """In what a target differs from the unbroken one."""
        ours, reference = self.work / target, self.folder / target
        if ours.is_dir():
            names = [{path.name for path in folder.iterdir()} for folder in (ours, reference)]
            weights = [
                (folder / "model.safetensors").read_bytes() for folder in (ours, reference) if names[0] == names[1]
            ]
            return [] if len(set(weights)) == 1 else [f"{target} isn't the unbroken one: {names}"]
        texts = [path.read_text() for path in (ours, reference)]
        if target == "evaluate.json":
            texts = [
                str({key: value for key, value in json.loads(text).items() if "_per_" not in key and "time" not in key})
                for text in texts
            ]
        return [] if texts[0] == texts[1] else [f"{target} isn't the unbroken one: {texts[0][:200]}"]

    def _workers(self, number: int, dice: random.Random) -> dict[str, Any]:
        """A sweep under joblib in a real process; Ctrl-C reaches its workers, too."""
        place = self.work / "sweep"
        words = [*self.run, KEPT, *SWEPT, f"hydra.sweep.dir={place}", "launcher=joblib"]
        with self.log.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "loraplus_hydra", *words],
                cwd=self.work,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            moment, which = time.monotonic() + dice.uniform(1, 60), dice.choice(SIGNALS[:3])
            while time.monotonic() < moment and child.poll() is None:
                time.sleep(0.05)
            if sent := child.poll() is None:
                (os.killpg if which == signal.SIGINT else os.kill)(child.pid, which)
            began = time.monotonic()
            status = child.wait(_PATIENCE)
        ended = Ended(status if status >= 0 else 128 - status, self.log.read_text(errors="replace"), 0.0, 0)
        broken = Signalled(ended, sent, time.monotonic() - began if sent and status == 0 else 0.0, which)
        return {"scenario": "joblib", **self._sweep_again(broken, place, words)}

    def _at(self, dice: random.Random, seconds: float) -> Callable[[int], bool]:
        moment = dice.uniform(0, seconds)
        return lambda pid: _processor_time(pid) >= moment

    def _signalled(
        self, words: list[str], dice: random.Random, condition: Callable[[int], bool], later: float = 0.0
    ) -> Signalled:
        """Run a command that gets a signal once `condition` holds, at times a second one soon after."""
        which = dice.choice(SIGNALS)
        second = dice.uniform(0, 0.3) if dice.random() < 0.15 else None
        child = start(words, self.log, prepare=lambda: os.chdir(self.work))
        sent, at_signal, deadline = False, 0.0, time.monotonic() + _PATIENCE
        while not (waited := os.wait4(child, os.WNOHANG))[0]:
            if not sent and condition(child):
                time.sleep(later)
                at_signal, sent = _processor_time(child), True
                os.kill(child, which)
            if sent and second is not None and _processor_time(child) > at_signal + second:
                os.kill(child, which)
                second = None
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                deadline += _PATIENCE
            time.sleep(0.001)
        _, status, used = waited
        code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        output = self.log.read_text(encoding="utf-8", errors="replace")
        ended = Ended(code if code >= 0 else 128 - code, output, seconds, 0)
        return Signalled(ended, sent, seconds - at_signal, which)

    def _faults(self, broken: Signalled, place: Path) -> list[str]:
        """What is wrong with how a command ended that got a signal."""
        ended = broken.ended
        found = [
            f"{text}: {ended.output[-1500:]}" for text in (*UNEXPECTED, "Exception ignored") if text in ended.output
        ]
        right = 128 + broken.which if broken.sent else 0
        if ended.status != right and not (ended.status == 0 and broken.after < _TAIL):
            found.append(
                f"status {ended.status}, not {right}, {broken.after:.2f} s after the signal: {ended.output[-600:]}"
            )
        if broken.which != signal.SIGKILL:
            found += [f"left: {path}" for path in place.rglob("*.unfinished")]
        return found

    def _continued(self, broken: Signalled, place: Path, words: list[str]) -> dict[str, Any]:
        """Resume a run and compare it with the unbroken one."""
        faults = self._faults(broken, place)
        if place.exists():
            faults += unreadable(place)
        if not (place / "result.json").exists() or json.loads((place / "result.json").read_text())["status"] != "ok":
            ended = command(
                [word for word in again(place, words) if not word.startswith("hydra.run.dir") or place.name in word],
                self.work,
            )
            if ended.status:
                return self._seen(broken, [*faults, f"given again: {ended.status}: {ended.output[-800:]}"])
        found = [what for what in differences(place, self.unbroken) if what != "config_hash"]
        return self._seen(broken, faults + found)

    def _seen(self, broken: Signalled, faults: list[str]) -> dict[str, Any]:
        return {
            "signal": broken.which.name,
            "sent": broken.sent,
            "status": broken.ended.status,
            "after": round(broken.after, 2),
            "faults": faults,
        }

    def _time(self, name: str, words: list[str]) -> None:
        (self.folder / "first").mkdir(exist_ok=True)
        ended = command(words, self.folder / "first")
        assert ended.status == 0, ended.output
        self.seconds[name] = ended.seconds


def _processor_time(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    trials(lambda folder, overrides: Trials(folder, overrides).one)
