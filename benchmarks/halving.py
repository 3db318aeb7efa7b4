"""Successive halving against the full grid.

    python -m benchmarks.halving [folder=FOLDER]

Each search is run twice, in folders of its own: halved, and with all jobs to their last step. The full grid's jobs also
write their losses on the rungs' rows there (`sweep.stop_at=1`). So the setting that halving picks is compared with the
best one in pairs, row by row. CPU seconds include everything, also the report. A search is stored when it has ended; a
second call runs only what is missing. With `folder`, its sweeps are kept there, and one that was killed continues. The
CPU seconds of such a sweep are those of its last part.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.product import failure, run
from loraplus_hydra.io.read import read_json
from loraplus_hydra.io.rungs import Rung, read_rungs
from loraplus_hydra.sweep.halving import compare

_WITHIN = 2.0  # standard errors


def cpu_seconds(arguments: list[str], threads: int, folder: Path) -> float:
    """Return the CPU seconds of a sweep in a new process, which writes into `folder`.

    If it has ended before, they are read.
    """
    ended = folder.with_suffix(".json")
    if ended.exists():
        return float(read_json(ended)["cpu_seconds"])
    seconds, done = run([*arguments, f"hydra.sweep.dir={folder}"], threads)
    if not list(folder.glob("*/result.json")):
        raise failure(done)
    ended.write_text(json.dumps({"cpu_seconds": seconds}) + "\n", encoding="utf-8")
    return seconds


def measure(overrides: list[str], seed: int, threads: int, folder: Path) -> dict[str, Any]:
    """Run one search halved and in full, and compare what they pick."""
    words = [*overrides, f"seed={seed}"]
    halved = cpu_seconds([*words, "halving=true"], threads, folder / "halved")
    full = cpu_seconds([*words, "sweep.stop_at=1"], threads, folder / "full")
    ends = {path.parent.name: _last(path.parent) for path in (folder / "full").glob("*/rungs.json")}
    picked = [path.parent.name for path in (folder / "halved").glob("*/adapter")]
    chosen, best = (min(names, key=lambda name: ends[name].loss) for names in (picked, list(ends)))
    difference, error = compare([ends[chosen]], [ends[best]])
    steps = read_json(folder / "halved" / "halving.json")
    return {
        "seed": seed,
        "jobs": len(ends),
        "picked": chosen,
        "best": best,
        "difference": difference,
        "error": error,
        "is_as_good": difference <= _WITHIN * error,
        "share": steps["job_steps"] / steps["of"],
        "cpu_seconds": {"halved": halved, "full": full},
        "rungs": steps["rungs"],
    }


def _last(job: Path) -> Rung:
    return max(read_rungs(job), key=lambda rung: rung.step)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| grid | jobs | searches | best or as good | largest loss of the pick | job-steps | CPU time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case, searches in results.items():
        worst = max(searches, key=lambda one: one["difference"])
        share = max(one["share"] for one in searches)
        time = sum(one["cpu_seconds"]["halved"] for one in searches) / sum(
            one["cpu_seconds"]["full"] for one in searches
        )
        lines.append(
            f"| {case} | {searches[0]['jobs']} | {len(searches)} | {sum(one['is_as_good'] for one in searches)} "
            f"| {worst['difference']:.4f} ± {worst['error']:.4f} | {share:.1%} | {time:.1%} |"
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
    for name, case in config.cases.items():
        for seed in case.seeds:
            if any(one["seed"] == seed for one in results.get(name, ())):
                continue
            kept = config.folder and Path(config.folder) / re.sub(r"\W+", "_", f"{name} {seed}")
            with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
                one = measure([*case.overrides, *config.shared], seed, config.threads, Path(folder))
            results.setdefault(str(name), []).append(one)
            out.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
