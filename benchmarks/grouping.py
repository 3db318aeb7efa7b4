"""How long grouping takes: `peft.optimizers.create_loraplus_optimizer`, ours, and a bare `named_parameters()` walk.

    python -m benchmarks.grouping [modules=[448] repeats=[5]]

Both functions get an optimizer class that only keeps its groups, so that grouping alone is timed. Rounds alternate.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer as peft_function
from torch import nn

from loraplus_hydra import create_loraplus_optimizer


class NullOptimizer(torch.optim.Optimizer):
    """Keeps its groups and does nothing else."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        self.param_groups = list(params)
        self.state = {}


def model_of(modules: int) -> nn.Module:
    """A PEFT model with that many LoRA modules, 448 to a block as in a 32-layer Llama, each of 2 x 4 numbers."""
    per_block = 7
    blocks = [
        nn.ModuleDict({f"linear_{index}": nn.Linear(4, 4, bias=False) for index in range(per_block)})
        for _ in range(-(-modules // per_block))
    ]
    for index in range(len(blocks) * per_block - modules):
        del blocks[-1][f"linear_{index}"]
    base = nn.Module()
    base.layers = nn.ModuleList(blocks)
    targets = [f"linear_{index}" for index in range(per_block)]
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets), low_cpu_mem_usage=False)


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    returned = call()
    return time.perf_counter() - started, returned


def same_groups(first: Any, second: Any) -> bool:
    """The same tensors in the same order, rates and decays, group by group."""
    return len(first.param_groups) == len(second.param_groups) and all(
        [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        and (one["lr"], one["weight_decay"]) == (other["lr"], other["weight_decay"])
        for one, other in zip(first.param_groups, second.param_groups, strict=True)
    )


def measure(modules: int, repeats: int) -> dict[str, Any]:
    model = model_of(modules)
    arguments: dict[str, Any] = {"lr": 1e-4, "loraplus_lr_ratio": 16.0}
    times: dict[str, list[float]] = {"peft": [], "ours": [], "walk": []}
    same = True
    for _ in range(repeats):
        walk, _ = seconds(lambda: [name for name, p in model.named_parameters() if p.requires_grad])
        ours, mine = seconds(lambda: create_loraplus_optimizer(model, NullOptimizer, **arguments))
        peft, theirs = seconds(lambda: peft_function(model, NullOptimizer, **arguments))
        same = same and same_groups(mine, theirs)
        for name, value in (("peft", peft), ("ours", ours), ("walk", walk)):
            times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = [peft / ours for peft, ours in zip(times["peft"], times["ours"], strict=True)]
    to_walk = [ours / walk for ours, walk in zip(times["ours"], times["walk"], strict=True)]
    return {
        "modules": modules,
        "repeats": repeats,
        "seconds": median,
        "peft_over_ours": statistics.median(ratios),
        "ours_over_walk": statistics.median(to_walk),
        "same_groups": same,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| LoRA modules | PEFT | ours | bare walk | PEFT / ours | ours / walk | same groups |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in results:
        peft, ours, walk = (row["seconds"][name] for name in ("peft", "ours", "walk"))
        lines.append(
            f"| {row['modules']:,} | {peft:.3f} s | {ours:.3f} s | {walk:.3f} s | {row['peft_over_ours']:.0f} x "
            f"| {row['ours_over_walk']:.1f} x | {'yes' if row['same_groups'] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    torch.set_num_threads(config.threads)
    results = []
    for modules, repeats in zip(config.modules, config.repeats, strict=True):
        results.append(measure(modules, repeats))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    out.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
