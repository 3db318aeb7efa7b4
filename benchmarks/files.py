"""CPU time of a run's files, and of a sweep's report.

    python -m benchmarks.files [checkouts=[../before,.]]

Every function of the room `io`, and all that the Trainer does to save a checkpoint, is timed in a real run. A function
that another timed one calls counts once. Seconds are CPU seconds, since the machine may run other work.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import json
import os
import pkgutil
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import loraplus_hydra
from loraplus_hydra import io
from loraplus_hydra.cli.main import main as command_line
from loraplus_hydra.data import fingerprint
from loraplus_hydra.io.metrics_log import MetricsLog
from loraplus_hydra.io.result import Result
from loraplus_hydra.training.hf_trainer.checkpoint_callback import CheckpointCallback
from loraplus_hydra.training.hf_trainer.resumable_mixin import ResumableMixin
from tests.support.finished_sweeps import write_job

ROOMS = ("files", "folders", "locks", "read", "checkpoints", "checkpoint_state", "result", "fingerprints")
METHODS = {
    MetricsLog: ("write",),
    Result: ("write",),
    CheckpointCallback: ("on_save",),
    ResumableMixin: ("_save_checkpoint",),
}


class Doors:
    """Sums of CPU seconds and of calls by function; what runs inside another timed function is that one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.depth = 0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds[name] += time.process_time() - started
                    self.calls[name] += 1

        return call

    def install(self) -> None:
        """Put timed functions in the place of the room's own, wherever they have been imported."""
        for module in pkgutil.walk_packages(loraplus_hydra.__path__, "loraplus_hydra."):
            if ".conf" not in module.name and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        modules = [module for name, module in sys.modules.items() if name.startswith("loraplus_hydra")]
        rooms = [importlib.import_module(f"{io.__name__}.{name}") for name in ROOMS] + [fingerprint]
        for room in rooms:
            for name, function in inspect.getmembers(room, inspect.isfunction):
                # A context manager's body is not the room's own, and its parts are timed by themselves.
                if function.__module__ == room.__name__ and not inspect.isgeneratorfunction(inspect.unwrap(function)):
                    timed = self.timed(f"{room.__name__.split('.', 1)[1]}.{name}", function)
                    for module in modules:
                        for alias, value in list(vars(module).items()):
                            if value is function:
                                setattr(module, alias, timed)
        for owner, names in METHODS.items():
            for name in names:
                setattr(owner, name, self.timed(f"{owner.__name__}.{name}", getattr(owner, name)))


def measure_run(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run the command line in this process, and return the CPU seconds of the run and of its files."""
    doors = Doors()
    doors.install()
    sys.argv = ["loraplus-hydra", *overrides, f"hydra.run.dir={folder}"]
    started = time.process_time()
    command_line()
    whole = time.process_time() - started
    named = sorted(doors.seconds.items(), key=lambda item: -item[1])
    return {
        "overrides": overrides,
        "seconds": whole,
        "files": sum(doors.seconds.values()),
        "share": sum(doors.seconds.values()) / whole,
        "functions": {name: {"seconds": taken, "calls": doors.calls[name]} for name, taken in named},
    }


def report_seconds(checkout: str, folder: Path) -> float:
    """Return the CPU seconds of a process that reports the sweep in `folder`.

    Raises SystemExit if the process fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve()), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "loraplus_hydra", "report", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=checkout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {checkout}:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_reports(checkouts: list[str], jobs: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Time the report of a made-up sweep in each checkout, in alternating rounds."""
    for number, (ratio, lr, seed) in enumerate(itertools.islice(_settings(), jobs)):
        overrides = {"loraplus.ratio": ratio, "optimizer.lr": lr, "seed": seed}
        write_job(folder / f"job-{number}", overrides, 1.0 + 0.01 * number % 0.3, norms=True)
    taken = [{checkout: report_seconds(checkout, folder) for checkout in checkouts} for _ in range(rounds)]
    medians = {checkout: statistics.median(each[checkout] for each in taken) for checkout in checkouts}
    return {"jobs": jobs, "seconds": taken, "median_seconds": medians}


def _settings() -> itertools.product[tuple[float, float, int]]:
    return itertools.product((1.0, 2.0, 4.0, 8.0, 16.0), (5e-5, 1e-4, 5e-4, 1e-3), range(100))


def table(results: dict[str, Any]) -> str:
    """Return the measurements as Markdown tables."""
    lines = []
    if run := results.get("run"):
        lines += ["| part of the run | calls | CPU seconds | share |", "|---|---:|---:|---:|"]
        for name, part in list(run["functions"].items())[:8]:
            share = part["seconds"] / run["seconds"]
            lines.append(f"| `{name}` | {part['calls']:,} | {part['seconds']:.3f} | {share:.2%} |")
        lines += [
            f"| all files | | {run['files']:.2f} | {run['share']:.2%} |",
            f"| run | | {run['seconds']:.1f} | |",
            "",
        ]
    if reports := results.get("reports"):
        lines += [f"| report of {reports['jobs']} jobs | CPU seconds |", "|---|---:|"]
        lines += [f"| {checkout} | {taken:.2f} |" for checkout, taken in reports["median_seconds"].items()]
    return "\n".join(lines)


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    torch.set_num_threads(config.threads)
    results: dict[str, Any] = {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    out = Path(config.out).absolute()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if config.checkouts:
            (folder / "sweep").mkdir()
            results["reports"] = measure_reports(list(config.checkouts), config.jobs, config.rounds, folder / "sweep")
        if config.overrides:
            results["run"] = measure_run(list(config.overrides), folder / "run")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
