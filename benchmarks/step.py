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
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.training.lean.frozen import onednn_is_faster

MEGABYTE = 2**20


def measured(way: str, config: DictConfig, case: DictConfig) -> dict[str, float]:
    """Run one way in a process of its own. Ends the program when it fails."""
    numbers = [case.get(name, config[name]) for name in ("steps", "eval_rows")]
    words = [way, config.device, *map(str, numbers), *map(str, case.overrides)]
    command = [sys.executable, "-m", "benchmarks.step_worker", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    taken: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return taken


def measure(config: DictConfig, name: str) -> dict[str, Any]:
    rounds = []
    for _ in range(config.rounds):
        rounds.append({way: measured(way, config, config.cases[name]) for way in config.ways})
        print(f"{name}: {json.dumps({way: round(taken['step'] * 1e3, 1) for way, taken in rounds[-1].items()})}")
    return {"case": name, "rounds": rounds, "median": medians(rounds), "ratio": ratios(rounds)}


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Way -> what was measured -> the median of its rounds."""
    return {
        way: {what: statistics.median(each[way][what] for each in rounds) for what in rounds[0][way]}
        for way in rounds[0]
    }


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Way -> what was measured -> the median, over the rounds, of that way's number over the lean one's."""
    return {
        way: {
            what: statistics.median(each[way][what] / each["lean"][what] for each in rounds)
            for what in rounds[0][way]
            if what in rounds[0]["lean"]
        }
        for way in rounds[0]
    }


def table(results: list[dict[str, Any]], ways: list[str]) -> str:
    """Return a Markdown table: times as medians, in brackets as multiples of the lean one's."""
    others = [way for way in ways if way != "lean"]
    lines = [
        f"| case | what | lean | {' | '.join(way.replace('_', ' ') for way in others)} |",
        f"|---|---|---:|{'---:|' * len(others)}",
    ]
    for row in results:
        for what, unit, scale in (("step", "ms", 1e3), ("evaluation", "s", 1.0), ("memory", "MB", 1 / MEGABYTE)):
            if what not in row["median"]["lean"]:
                continue
            cells = [_cell(row, way, what, unit, scale) for way in others]
            lean = row["median"]["lean"][what] * scale
            lines.append(f"| {row['case']} | {what} | {_shown(lean)} {unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], way: str, what: str, unit: str, scale: float) -> str:
    if what not in row["median"][way]:
        return "-"
    return f"{_shown(row['median'][way][what] * scale)} {unit} ({row['ratio'][way][what]:.2f} x)"


def _shown(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def processor() -> str:
    """Return the processor's name, where Linux tells it."""
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
    """Measure the cases of a benchmark's config, write `config.out` and print the table."""
    results = []
    started = time.monotonic()
    for name in config.run or config.cases:
        if missing := [each for each in config.cases[name].needs if config[each] is None]:
            print(f"{name}: left out, since it needs {', '.join(f'{each}=...' for each in missing)}")
            continue
        if time.monotonic() - started > 60 * config.minutes:
            print(f"{name}: left out after {config.minutes} minutes")
            continue
        results.append(measure(config, name))
        print(table(results[-1:], list(config.ways)), flush=True)
    names = ("torch", "transformers", "peft", "trl")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    machine = {"processor": processor(), "onednn": onednn_is_faster(), "threads": config.threads}
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = {"versions": versions, "machine": machine, "results": results}
    out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(results, list(config.ways)))


if __name__ == "__main__":
    main()
