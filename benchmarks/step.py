"""A training step and an evaluation in four ways, side by side.

    python -m benchmarks.step [run=['embedded, batch 16'] rounds=5]

Each measurement is a process of its own, since glibc's setting can't be taken back; the ways take turns. All ways train
on the same batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.training.lean.frozen import onednn_is_faster

MEGABYTE = 2**20


def measured(way: str, config: DictConfig, case: DictConfig) -> dict[str, float] | None:
    """Measure one way in a new process.

    If the process fails or hangs, print the end of its output and return None.
    """
    numbers = [case.get(name, config[name]) for name in ("steps", "eval_rows")]
    words = [way, config.device, *map(str, numbers), *map(str, case.overrides)]
    command = [sys.executable, "-m", "benchmarks.step_worker", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                command, env=environment, stdout=output, stderr=output, check=False, timeout=config.seconds
            )
            status = f"ended with status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            status = f"was stopped after {config.seconds} seconds"
        output.seek(0)
        text = output.read()
    if status is None:
        taken: dict[str, float] = json.loads(text.splitlines()[-1])
        return taken
    print(f"{shlex.join(command)} {status}:\n{text[-2000:]}", flush=True)
    return None


def measure(config: DictConfig, name: str, deadline: float) -> dict[str, Any]:
    """Measure a case in rounds. In each round, all ways are measured in turn.

    No process is started after `deadline`.
    """
    rounds: list[dict[str, dict[str, float]]] = []
    failed: set[str] = set()
    for _ in range(config.rounds):
        if time.monotonic() > deadline:
            break
        taken: dict[str, dict[str, float]] = {}
        for way in config.ways:
            if way in failed or time.monotonic() > deadline:
                continue
            numbers = measured(way, config, config.cases[name])
            if numbers is None:
                failed.add(way)
            else:
                taken[way] = numbers
        rounds.append(taken)
        print(f"{name}: {json.dumps({way: round(each['step'] * 1e3, 1) for way, each in taken.items()})}", flush=True)
    return {"case": name, "rounds": rounds, "failed": sorted(failed), **compared(rounds)}


def compared(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return medians over the rounds: each way's numbers, and their ratios to lean's numbers.

    A ratio compares numbers of the same round.
    """
    median: dict[str, dict[str, float]] = {}
    ratio: dict[str, dict[str, float]] = {}
    for way in {way: None for each in rounds for way in each}:
        of_way = [each for each in rounds if way in each]
        beside_lean = [each for each in of_way if "lean" in each]
        for what in of_way[0][way]:
            median.setdefault(way, {})[what] = statistics.median(each[way][what] for each in of_way)
            ratios = [each[way][what] / each["lean"][what] for each in beside_lean if what in each["lean"]]
            if ratios:
                ratio.setdefault(way, {})[what] = statistics.median(ratios)
    return {"median": median, "ratio": ratio}


def table(results: list[dict[str, Any]], ways: list[str]) -> str:
    """Return a Markdown table: times as medians, in brackets as multiples of the lean one's."""
    lines = [
        f"| case | what | {' | '.join(way.replace('_', ' ') for way in ways)} |",
        f"|---|---|{'---:|' * len(ways)}",
    ]
    for row in results:
        for what, unit, scale in (("step", "ms", 1e3), ("evaluation", "s", 1.0), ("memory", "MB", 1 / MEGABYTE)):
            if any(what in numbers for numbers in row["median"].values()):
                cells = [_cell(row, way, what, unit, scale) for way in ways]
                lines.append(f"| {row['case']} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], way: str, what: str, unit: str, scale: float) -> str:
    number = row["median"].get(way, {}).get(what)
    if number is None:
        return "failed" if way in row["failed"] else "-"
    ratio = row["ratio"].get(way, {}).get(what)
    beside = "" if way == "lean" or ratio is None else f" ({ratio:.2f} x)"
    return f"{_shown(number * scale)} {unit}{beside}"


def _shown(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def processor(device: str) -> str:
    """Return the name of the processor or GPU that is measured."""
    if device == "gpu":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config.text = argparse.__file__  # 100 kB that every machine has
    measure_all(OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:])))


def measure_all(config: Any) -> None:
    """Measure the cases of a benchmark's config, write `config.out` after each, and print the table.

    Ends the program with status 1 if a way failed.
    """
    names = ("torch", "transformers", "peft", "trl")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    machine = {"processor": processor(config.device), "onednn": onednn_is_faster(), "threads": config.threads}
    deadline = time.monotonic() + 60 * config.minutes
    results: list[dict[str, Any]] = []
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in config.run or config.cases:
        if missing := [each for each in config.cases[name].needs if config[each] is None]:
            print(f"{name}: left out, since it needs {', '.join(f'{each}=...' for each in missing)}")
        elif time.monotonic() > deadline:
            print(f"{name}: left out after {config.minutes} minutes")
        else:
            results.append(measure(config, name, deadline))
            written = {"versions": versions, "machine": machine, "results": results}
            out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(results, list(config.ways)))
    if any(each["failed"] for each in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
