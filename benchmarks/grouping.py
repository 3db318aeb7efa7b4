"""Time of grouping in PEFT's function, in ours, and of a bare `named_parameters()` walk.

    python -m benchmarks.grouping [run=[Qwen2.5-32B]]

Both functions get the same arguments and an optimizer class that only stores its groups, so only grouping is timed.
Rounds alternate. Seconds are CPU seconds: all three compute in one thread, and the machine may run other work.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer as peft_function
from torch import nn

from loraplus_hydra import create_loraplus_optimizer

MLP = ("gate_proj", "up_proj", "down_proj")
WIDTH = 4  # of every weight; grouping does not depend on it


class NullOptimizer(torch.optim.Optimizer):
    """An optimizer that only stores its groups."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        self.param_groups = list(params)
        self.state = defaultdict(dict)


def model_of(layout: DictConfig) -> nn.Module:
    """Return a PEFT model with a published model's modules and LoRA of rank 2."""
    layers = nn.ModuleList([_layer(layout, dense=index < layout.dense_layers) for index in range(layout.layers)])
    body = _module(embed_tokens=nn.Embedding(WIDTH, WIDTH), layers=layers, norm=nn.RMSNorm(WIDTH))
    base = _module(model=body, lm_head=_linear())
    config = LoraConfig(r=2, target_modules=[*layout.attention, *MLP])
    return get_peft_model(base, config, low_cpu_mem_usage=False)


def _layer(layout: DictConfig, *, dense: bool) -> nn.Module:
    attention = {name: _linear() for name in layout.attention}
    attention |= {name: nn.RMSNorm(WIDTH) for name in layout.attention_norms}
    norms = {name: nn.RMSNorm(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
    return _module(self_attn=_module(**attention), mlp=_mlp() if dense else _experts(layout), **norms)


def _experts(layout: DictConfig) -> nn.Module:
    shared = {"shared_experts": _mlp()} if layout.shared_experts else {}
    return _module(gate=_linear(), experts=nn.ModuleList([_mlp() for _ in range(layout.experts)]), **shared)


def _mlp() -> nn.Module:
    return _module(**{name: _linear() for name in MLP})


def _linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


def _module(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds that the call takes, and its value."""
    gc.collect()  # else it may fall into this call, for objects of the one before
    started = time.process_time()
    returned = call()
    return time.process_time() - started, returned


def same_groups(first: Any, second: Any) -> bool:
    """Return True if two optimizers' groups have equal tensors, rates and decays."""
    return len(first.param_groups) == len(second.param_groups) and all(
        [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        and (one["lr"], one["weight_decay"]) == (other["lr"], other["weight_decay"])
        for one, other in zip(first.param_groups, second.param_groups, strict=True)
    )


def measure(name: str, layout: DictConfig) -> dict[str, Any]:
    """Time the walk and both functions on one model, in alternating rounds."""
    model = model_of(layout)
    arguments: dict[str, Any] = {"lr": 1e-4, "loraplus_lr_ratio": 16.0}
    calls: dict[str, Callable[[], Any]] = {
        "walk": lambda: [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "ours": lambda: create_loraplus_optimizer(model, NullOptimizer, **arguments),
        "peft": lambda: peft_function(model, NullOptimizer, **arguments),
    }
    rounds: list[dict[str, float]] = []
    same = True
    for _ in range(layout.rounds):
        timed = {which: seconds(call) for which, call in calls.items()}
        rounds.append({which: taken for which, (taken, _) in timed.items()})
        same = same and same_groups(timed["ours"][1], timed["peft"][1])
    return {
        "model": name,
        "modules": sum(hasattr(module, "lora_A") for module in model.modules()),
        "seconds": rounds,
        "median_seconds": {which: statistics.median(taken[which] for taken in rounds) for which in calls},
        "peft_over_ours": statistics.median(taken["peft"] / taken["ours"] for taken in rounds),
        "ours_over_walk": statistics.median(taken["ours"] / taken["walk"] for taken in rounds),
        "same_groups": same,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the medians as a Markdown table."""
    lines = [
        "| model | LoRA modules | PEFT | ours | bare walk | PEFT / ours | ours / walk | ours, a module | same groups |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in results:
        peft, ours, walk = (row["median_seconds"][name] for name in ("peft", "ours", "walk"))
        lines.append(
            f"| {row['model']} | {row['modules']:,} | {peft:.3f} s | {ours:.3f} s | {walk:.3f} s "
            f"| {row['peft_over_ours']:.1f} x | {row['ours_over_walk']:.2f} x | {ours / row['modules'] * 1e6:.1f} µs "
            f"| {'yes' if row['same_groups'] else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    torch.set_num_threads(config.threads)
    results = []
    for name in config.run or config.models:
        results.append(measure(name, config.models[name]))
        print(table(results[-1:]).splitlines()[-1], flush=True)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}
    out.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(results))


if __name__ == "__main__":
    main()
