"""Time of a ratio sweep in one process, and in one process per job.

    python -m benchmarks.sweep [ratios=[1,16] rounds=3]

Both run the same jobs, and must end with the same metrics. The sweep's time includes its report.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from loraplus_hydra.io.read import read_json, read_yaml


def seconds(arguments: list[str], threads: int) -> float:
    """Return the seconds that a new process takes. Raises SystemExit if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    command = [sys.executable, "-m", "loraplus_hydra", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def metrics(folder: Path) -> dict[float, float]:
    """Return ratio -> metric of the jobs in `folder`."""
    found = {}
    for path in folder.glob("*/result.json"):
        result, config = read_json(path), read_yaml(path.with_name("config.yaml"))
        found[float(config["loraplus"]["ratio"])] = result["metrics"][result["metric"]]
    return found


def measure(config: Any, folder: Path) -> dict[str, Any]:
    """Time one round: the sweep, then the processes."""
    ratios, shared = list(config.ratios), list(config.overrides)
    swept = f"loraplus.ratio={','.join(map(str, ratios))}"
    sweep = ["-m", *shared, swept, f"hydra.sweep.dir={folder / 'sweep'}"]
    together = seconds(sweep, config.threads)
    each = [
        seconds([*shared, f"loraplus.ratio={ratio}", f"hydra.run.dir={folder / 'alone' / str(ratio)}"], config.threads)
        for ratio in ratios
    ]
    return {
        "one_process": together,
        "processes": sum(each),
        "each": each,
        "same_metrics": metrics(folder / "sweep") == metrics(folder / "alone"),
    }


def table(results: dict[str, Any]) -> str:
    """Return the medians as a Markdown table."""
    return "\n".join(
        [
            "| jobs | one process | a process each | one / each | same metrics |",
            "|---:|---:|---:|---:|---|",
            f"| {results['jobs']} | {results['one_process']:.0f} s | {results['processes']:.0f} s "
            f"| {results['share']:.2f} | {'yes' if results['same_metrics'] else 'NO'} |",
        ]
    )


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    rounds = []
    for _ in range(config.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(config, Path(folder)))
    results = {
        "jobs": len(config.ratios),
        "one_process": statistics.median(one["one_process"] for one in rounds),
        "processes": statistics.median(one["processes"] for one in rounds),
        "share": statistics.median(one["one_process"] / one["processes"] for one in rounds),
        "same_metrics": all(one["same_metrics"] for one in rounds),
        "rounds": rounds,
    }
    names = ("torch", "transformers", "peft", "hydra-core")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = {"versions": versions, "overrides": list(config.overrides), "results": results}
    out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
