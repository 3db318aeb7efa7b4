"""The pictures of the pages.

`python -m tools.docs.pictures [NAME ...]` makes all or the named ones again. Each is the figure that a command of the
pages leaves.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.docs.markdown import ROOT

IMAGES = ROOT / "docs" / "images"
# Picture -> (overrides of the command, the figure in its folder)
OF_RUNS = {
    "train.png": ([], "train.png"),
    "heatmap.png": (
        ["hparams_search=lr_grid", "trainer.max_steps=50", "trainer.eval_strategy=no"],
        "heatmap.png",
    ),
    "ratio.png": (
        [
            "--multirun",
            "loraplus.ratio=1,2,4,8,16,32",
            "optimizer.lr=5e-4,2e-3",
            "data.max_samples=400",
            "trainer.per_device_train_batch_size=4",
            "trainer.eval_strategy=no",
            "task.samples=0",
        ],
        "ratio.png",
    ),
    "toy_heatmap.png": (["hparams_search=toy"], "heatmap.png"),
}
# Picture -> the module that makes it from results in the repository
_STUDY = ("embedded", "minilm", "smollm2", "a_zero", "no_clipping")  # the grids of benchmarks/claims.yaml
OF_BENCHMARKS = {f"study_{name}.png": ["benchmarks.claims", "table=true"] for name in _STUDY}


def main(names: list[str]) -> None:
    """Make the pictures again."""
    names = names or [*OF_RUNS, *OF_BENCHMARKS]
    for words in {shlex.join(OF_BENCHMARKS[name]) for name in names if name in OF_BENCHMARKS}:
        subprocess.run([sys.executable, "-m", *shlex.split(words)], cwd=ROOT, check=True)
    for name in names:
        if name in OF_BENCHMARKS:
            continue
        overrides, figure = OF_RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            place = [f"hydra.run.dir={folder}/run", f"hydra.sweep.dir={folder}/run"]
            subprocess.run([sys.executable, "-m", "loraplus_hydra", *overrides, *place], cwd=ROOT, check=True)
            shutil.copyfile(Path(folder) / "run" / figure, IMAGES / name)
        print(f"{name}: {(IMAGES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
