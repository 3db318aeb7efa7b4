"""Runs of the command line in forked processes, to be killed or stopped, and what they leave.

`write_trials` trains a run that nothing breaks, then others that are broken and resumed, and prints a JSON line for
each: what was seen, and in what it differs in the end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

NOT_COMPARED = (
    "seconds",
    "tokens_per_second",
    "memory_bytes",
    "model_flops_utilisation",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_model_preparation_time",
)


def start(arguments: list[str], log: Path, *, prepare: Callable[[], None] = lambda: None) -> int:
    """The process id of a forked child that runs the command line with `arguments`; its output goes to `log`.

    The child calls `prepare` first.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        from loraplus_hydra.cli.main import main

        sys.argv = ["loraplus-hydra", *arguments]
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:  # before the program has its own handler
            status = 128 + signal.SIGINT
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """The exit status of a child, as a shell has it: 128 + the signal's number for one that was killed."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def ended(child: int) -> bool:
    """Whether a child has ended by itself; it is then waited for."""
    pid, _ = os.waitpid(child, os.WNOHANG)
    return pid == child


def unfinished_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(not (place / "manifest.json").exists() for place in (folder / "checkpoints").glob("checkpoint-*"))


def there_when(child: int, condition: Callable[[], bool]) -> bool:
    """Wait until `condition` holds; whether the child is still there then."""
    while not condition():
        if ended(child):
            return False
        time.sleep(0.0005)
    return not ended(child)


def killed_when(child: int, condition: Callable[[], bool]) -> bool:
    """Kill a child once `condition` holds, and wait for its end; whether it was still there."""
    there = there_when(child, condition)
    if there:
        os.kill(child, signal.SIGKILL)
        wait(child)
    return there


def killed_within(child: int, seconds: float, chance: random.Random) -> bool:
    """Kill a child at some moment of its time; whether it was still there."""
    moment = time.perf_counter() + chance.uniform(0.1, 1.0) * seconds
    return killed_when(child, lambda: time.perf_counter() > moment)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without what a clock says."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [
        {key: value for key, value in json.loads(line).items() if key not in NOT_COMPARED} for line in text.splitlines()
    ]


def unreadable(folder: Path) -> list[str]:
    """Files of a run's folder, by the names they are known by, that can't be read."""
    from safetensors import safe_open

    from loraplus_hydra.io.checkpoints import MANIFEST, defect, sealed

    broken = []
    for path in sorted(folder.rglob("*.json*")) + sorted(folder.rglob("*.yaml")):
        if path.name.startswith(".") or (
            path.parent.name.startswith("checkpoint-") and not (path.parent / MANIFEST).exists()
        ):
            continue
        try:
            if path.suffix == ".jsonl":
                for line in path.read_text(encoding="utf-8").splitlines():
                    json.loads(line)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.stat().st_size == 0 and path.name == "config.yaml" and path.parent == folder:
                broken.append(str(path))
        except ValueError as error:
            broken.append(f"{path}: {error}")
    broken += [f"{place}: {why}" for place in sealed(folder / "checkpoints") if (why := defect(place))]
    for path in folder.glob("adapter/*.safetensors"):
        with safe_open(path, "np") as file:
            list(file.keys())
    return broken


def differences(folder: Path, reference: Path) -> list[str]:
    """In what a finished run differs from another: the adapter's bytes, the lines of metrics.jsonl, the result."""
    found = []
    weights = "adapter/adapter_model.safetensors"
    if (folder / weights).read_bytes() != (reference / weights).read_bytes():
        found.append("adapter")
    if lines(folder) != lines(reference):
        found.append("metrics.jsonl")
    results = [json.loads((place / "result.json").read_text()) for place in (folder, reference)]
    found += [
        key
        for key in ("status", "steps", "train_loss", "best", "samples", "config_hash")
        if results[0][key] != results[1][key]
    ]
    return found


def killed_in_save(child: int, folder: Path, chance: random.Random) -> bool:
    """Kill a child at some moment of one of its saves; whether it was still there."""
    for save in range(chance.randint(1, 4)):
        if save and not there_when(child, lambda: not unfinished_checkpoint(folder)):
            return False
        if not there_when(child, lambda: unfinished_checkpoint(folder)):
            return False
    while True:
        time.sleep(chance.uniform(0, 0.004))
        if unfinished_checkpoint(folder):
            return killed_when(child, lambda: True)
        if not there_when(child, lambda: unfinished_checkpoint(folder)):  # that save is over: the next one
            return False


def again(place: Path, overrides: list[str]) -> list[str]:
    """The command that goes on with a killed run."""
    if (place / "config.yaml").is_file():
        return ["resume", str(place)]
    # It was killed before or while Hydra wrote its own files: there is nothing to resume.
    return [*overrides, f"hydra.run.dir={place}", "trainer.resume_from_checkpoint=auto"]


def killed_and_resumed(
    folder: Path, overrides: list[str], trial: int, duration: float, chance: random.Random
) -> dict[str, Any]:
    """One trial: a run that is killed and resumed, and what was seen of it."""
    place, log = folder / f"trial{trial}", folder / "log"
    child = start([*overrides, f"hydra.run.dir={place}"], log)
    killed = killed_in_save(child, place, chance) if trial % 2 else killed_within(child, duration, chance)
    seen = {"killed": killed, "in_save": killed and unfinished_checkpoint(place), "broken": unreadable(place)}
    if trial % 3 == 2:
        child = start(again(place, overrides), log)
        seen["killed_again"] = killed_within(child, duration, chance)
        seen["broken"] += unreadable(place)
    status = wait(start(again(place, overrides), log))
    return seen | {"status": status, "differences": differences(place, folder / "unbroken")}


def stopped_and_resumed(folder: Path, overrides: list[str], number: signal.Signals) -> dict[str, Any]:
    """One trial: a run that gets a signal in the middle of training and is resumed."""
    place, log = folder / number.name, folder / "log"
    metrics = place / "metrics.jsonl"
    child = start([*overrides, f"hydra.run.dir={place}"], log)
    status = None
    if there_when(child, lambda: metrics.is_file() and metrics.read_text().count("\n") > 3):
        os.kill(child, number)
        status = wait(child)
    result = json.loads((place / "result.json").read_text())
    checkpoints = sorted(int(path.parent.name.rpartition("-")[2]) for path in place.glob("checkpoints/*/manifest.json"))
    seen = {"stopped_with": status, "said": result["status"], "steps": result["steps"], "newest": checkpoints[-1]}
    status = wait(start(["resume", str(place)], log))
    return seen | {"status": status, "differences": differences(place, folder / "unbroken")}


def write_trials(folder: Path, how: str, draws: bool, overrides: list[str]) -> None:
    """Print a JSON line for each run that is broken and resumed; without `draws` no run draws its figure.

    `how` is a number of runs to kill with SIGKILL at random moments, every second one while it writes a checkpoint, and
    every third once more while it is resumed; or `signals`.
    """
    if not draws:
        from loraplus_hydra.runs import job

        vars(job)["draw_training"] = lambda *_: None  # it takes a third of a tiny run; children inherit this
    chance = random.Random(0)
    for place in (folder / "unbroken", folder / "again"):
        began = time.perf_counter()
        assert wait(start([*overrides, f"hydra.run.dir={place}"], folder / "log")) == 0, (folder / "log").read_text()
    duration = time.perf_counter() - began
    assert not differences(folder / "again", folder / "unbroken")
    if how == "signals":
        trials = (stopped_and_resumed(folder, overrides, number) for number in (signal.SIGINT, signal.SIGTERM))
    else:
        trials = (killed_and_resumed(folder, overrides, trial, duration, chance) for trial in range(2 * int(how)))
    killed = 0
    for seen in trials:
        print(json.dumps(seen), flush=True)
        killed += seen.get("killed", False)
        if str(killed) == how:  # on a loaded machine some kills come after the run's end, and don't count
            break
