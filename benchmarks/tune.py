"""`tune` against the full grid of its candidates.

    python -m benchmarks.tune [run=['embedded default']]

Each search runs in a folder of its own. With `grid`, every candidate is also trained to its end with the search's first
seed. The regret is the relative difference of the final metric to the best of them. CPU seconds include everything. A
search is stored when it has ended, and a second call runs only what is missing.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.product import failure, run
from loraplus_hydra.io.read import read_json


def cpu_seconds(words: list[str], threads: int) -> float:
    """Return the CPU seconds of a command. Ends the program if the command fails."""
    seconds, done = run(words, threads)
    if done.returncode:
        raise failure(done)
    return seconds


def measure(overrides: list[str], seed: int, grid: bool, threads: int, folder: Path) -> dict[str, Any]:
    """Run one search and, with `grid`, all its candidates to their ends."""
    words = [*overrides, f"seed={seed}"]
    seconds = cpu_seconds(["tune", *words, f"hydra.sweep.dir={folder / 'search'}"], threads)
    told = read_json(folder / "search" / "tune.json")
    found = {
        "seed": seed,
        "picked": told["winner"]["overrides"],
        "is_clear": bool(told["verdict"] and told["verdict"]["is_clear"]),
        "verdict": told["verdict"],
        "finalists": told["finalists"],
        "candidates": len(told["candidates"]),
        "cost": told["cost"],
        "cpu_seconds": seconds,
    }
    return {**found, **_full_grid(words, told, threads, folder)} if grid else found


def _full_grid(overrides: list[str], told: dict[str, Any], threads: int, folder: Path) -> dict[str, Any]:
    words = [text for text in overrides if not text.startswith("tune.")]
    ends, seconds = {}, []
    for place, candidate in enumerate(told["candidates"]):
        trained, name = folder / f"run-{place}", " ".join(candidate["overrides"])
        seconds.append(cpu_seconds([*words, *candidate["overrides"], f"hydra.run.dir={trained}"], threads))
        result = read_json(trained / "result.json")
        ends[name] = result["metrics"][result["metric"]]
        print(f"  {name}: {ends[name]:.4f}", flush=True)
    greater = told["greater_is_better"]
    best = (max if greater else min)(ends, key=ends.__getitem__)
    picked = ends[" ".join(told["winner"]["overrides"])]
    regret = abs(picked - ends[best]) / abs(ends[best])
    return {"best": best, "regret": regret, "ends": ends, "cpu_seconds_of_a_run": sum(seconds) / len(seconds)}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| case | searches | candidates | clear winner | largest regret | steps, in runs | CPU time, in runs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, searches in results.items():
        with_grid = [one for one in searches if "regret" in one]
        regret = f"{max(one['regret'] for one in with_grid):.2%}" if with_grid else "-"
        times = [one["cpu_seconds"] / one["cpu_seconds_of_a_run"] for one in with_grid]
        time = f"{max(times):.1f}" if times else "-"
        cost = max(one["cost"] for one in searches)
        clear = f"{sum(one['is_clear'] for one in searches)} of {len(searches)}"
        lines.append(
            f"| {case} | {len(searches)} | {searches[0]['candidates']} | {clear} | {regret} | {cost:.1f} | {time} |"
        )
    return "\n".join(lines)


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    names = ("torch", "transformers", "peft", "hydra-core")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = read_json(out)["results"] if out.exists() else {}
    for name in config.run or config.cases:
        case = config.cases[name]
        if missing := [each for each in case.needs if config[each] is None]:
            print(f"{name}: left out, since it needs {', '.join(f'{each}=...' for each in missing)}")
            continue
        for seed in case.seeds:
            if any(one["seed"] == seed for one in results.get(name, ())):
                continue
            with tempfile.TemporaryDirectory() as folder:
                one = measure(list(case.overrides), seed, case.grid, config.threads, Path(folder))
            print(f"{name}, seed {seed}: {one['picked']}, clear: {one['is_clear']}, {one['cost']:.1f} runs", flush=True)
            results.setdefault(str(name), []).append(one)
            out.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
