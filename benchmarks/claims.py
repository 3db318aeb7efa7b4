"""The study: LoRA+ against plain LoRA, both tuned over the same rates.

    python -m benchmarks.claims [parts=[embedded] minutes=60]
    python -m benchmarks.claims table=true

Each run is a process of the product's command line, on one thread. Its folder is deleted when its line is in the log.
If the program is killed, only the run in progress is lost.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks import product
from benchmarks.claims_log import Grid, Line, Setting, append, read_grids, read_log
from benchmarks.claims_pictures import write_pictures
from benchmarks.claims_tables import tables, with_tables
from benchmarks.step import processor
from loraplus_hydra.io.read import read_json, read_lines

_KEPT = ("status", "metrics", "metrics_before", "steps", "seconds", "train_seconds", "peak_memory_bytes", "versions")


def train(overrides: list[str], threads: int) -> Line:
    """Train once in a new process; return what the log keeps of the run."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        seconds, done = product.run([*overrides, f"hydra.run.dir={folder}"], threads)
        if done.returncode and not _has_diverged(folder):
            raise product.failure(done)
        return {"cpu_seconds": round(seconds, 2), **line_of(folder)}


def _has_diverged(folder: Path) -> bool:
    file = folder / "result.json"
    return file.exists() and (read_json(file).get("error") or {}).get("type") == "NotFiniteError"


def line_of(folder: Path) -> Line:
    """Return what the log keeps of a run's folder."""
    result = read_json(folder / "result.json")
    name = result["metric"]
    curve = {line["step"]: line[name] for line in read_lines(folder / "metrics.jsonl") if name in line}
    rows = result["inputs"].get("data.eval")
    return {**{key: result[key] for key in _KEPT}, "curve": sorted(curve.items()), "eval_rows": rows}


def run(grid: Grid, setting: Setting, paths: dict[str, str], config: Any) -> Line:
    """Train one setting and append its line to the log."""
    words = OmegaConf.create({**paths, "words": grid.overrides}).words  # with the paths of this machine
    taken = train([*words, *setting.overrides()], config.threads)
    line = {
        "grid": grid.name,
        "lr": setting.lr,
        "ratio": setting.ratio,
        "seed": setting.seed,
        **taken,
        "processor": processor("cpu"),
        "overrides": grid.overrides,
    }
    append(Path(config.out), line)
    return line


def train_missing(config: Any) -> None:
    """Train the runs that are missing from the log, until the time is over."""
    deadline = time.monotonic() + 60 * config.minutes
    for place, name in enumerate(config.grids):
        needs = config.grids[name].needs
        if name not in (config.parts or config.grids):
            continue
        if absent := [key for key in needs if config[key] is None]:
            print(f"{name}: left out, since it needs {', '.join(f'{key}=...' for key in absent)}")
            continue
        paths = {key: str(Path(config[key]).resolve()) for key in needs}
        # Read after each run, because a finished grid decides which rates are repeated
        while (grid := read_grids(config, read_log(Path(config.out)))[place]).missing():
            if time.monotonic() > deadline:
                break
            setting = grid.missing()[0]
            line = run(grid, setting, paths, config)
            value = line["metrics"].get(grid.metric)
            print(f"{name}: {' '.join(setting.overrides())}: {value}, {line['cpu_seconds']:.0f} CPU s", flush=True)
        print(f"{name}: {len(grid.runs)} of {grid.total} runs", flush=True)


def main() -> None:
    # A signal ends the run in progress, too: subprocess.run kills its process when an exception passes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    if not config.table:
        train_missing(config)
        return
    grids = read_grids(config, read_log(Path(config.out)))
    text = tables(grids)
    page = Path(config.page)
    page.write_text(with_tables(page.read_text(encoding="utf-8"), text), encoding="utf-8")
    write_pictures(grids, Path(config.images))
    print(text)


if __name__ == "__main__":
    main()
