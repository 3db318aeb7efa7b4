"""Made-up folders of sweeps, with the files that jobs leave, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from loraplus_hydra.report.results import SweepResults, results_of

Values = dict[Any, float]  # (ratio, seed) -> metric
STEPS = tuple(range(0, 201, 20))


def write_job(
    folder: Path,
    overrides: Mapping[str, Any],
    value: float | None,
    *,
    status: str = "ok",
    error: Mapping[str, str] | None = None,
    curve: Iterable[tuple[int, float]] | None = None,
    norms: bool = False,
    pace: float = 0.1,
    resumes: Iterable[Iterable[str]] = (),
    greater_is_better: bool = False,
    metric: str = "eval_loss",
) -> Path:
    """A job's folder as `loraplus_hydra.runs.job` leaves it; `overrides` become its config, `value` its last metric.

    `pace` is in seconds a step; `resumes` are the overrides of each, of which the config has nothing by itself.
    """
    (folder / ".hydra").mkdir(parents=True)
    seed = overrides.get("seed", 0)
    lr = overrides.get("optimizer.lr", 5e-5)
    loraplus = {"ratio": overrides.get("loraplus.ratio", 8.0)}
    if "loraplus.lr_A" in overrides or "loraplus.lr_B" in overrides:
        loraplus = {"lr_A": overrides.get("loraplus.lr_A", lr), "lr_B": overrides.get("loraplus.lr_B", 4e-4)}
    lr_A = loraplus.get("lr_A", lr)
    lr_B = loraplus["lr_B"] if "lr_B" in loraplus else lr * loraplus["ratio"]
    config = OmegaConf.create(
        {
            "seed": seed,
            "model": {"path": "pkg://loraplus_hydra.models/embedded", "lr": 5e-5},
            "adapter": {"_target_": "peft.LoraConfig", "r": 8, "lora_alpha": 16},
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr, "betas": [0.9, 0.999]},
            "scheduler": {"_target_": "transformers.optimization.get_linear_schedule_with_warmup"},
            "loraplus": {**loraplus, "rules": {"groupB": {"role": "lora_B", "ratio": loraplus.get("ratio")}}},
            "task": {"_target_": "trl.SFTTrainer", "metric": metric, "greater_is_better": greater_is_better},
            "data": {"_target_": "loraplus_hydra.data.embedded.load", "seed": seed},
            "trainer": {"max_steps": STEPS[-1]},
        }
    )
    for key, one in overrides.items():
        OmegaConf.update(config, key, one, force_add=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([f"{key}={one}" for key, one in overrides.items()]))
    for place, texts in enumerate(resumes):
        (folder / ".hydra" / f"resumed-{place}").mkdir()
        (folder / ".hydra" / f"resumed-{place}" / "overrides.yaml").write_text(json.dumps([*texts]))
    groups = (("lora_A", "groupA", lr_A), ("lora_B", "groupB", lr_B))
    (folder / "param_groups.json").write_text(
        json.dumps([{"name": f"q.{role}", "role": role, "group": group, "lr": rate} for role, group, rate in groups])
    )
    points = list(curve) if curve is not None else made_up_curve(value, seed)
    lines = []
    for step, height in points:
        line: dict[str, Any] = {"step": step, "seconds": step * pace + 0.5}
        if step:
            here = {"loss": height + 0.05 * math.sin(step + seed), "lr": {"groupA": lr_A, "groupB": lr_B}}
            if norms:
                here["norms"] = {
                    "groupA": {"weight": 4.2, "update": lr_A * 40},
                    "groupB": {"weight": lr_B * 3 * step, "update": lr_B * 30},
                }
            lines.append({**line, **here})
        lines.append({**line, metric: height})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "status": status,
        "metric": metric,
        "metrics": {} if value is None else {metric: value},
        "best": {} if value is None else {"step": STEPS[-1], "value": value},
        "steps": points[-1][0] if points else 0,
        "seconds": 21.5 + seed,
        "seed": seed,
        "device": "cpu",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2"},
        "error": error,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def made_up_curve(value: float | None, seed: int = 0, start: float = 5.25) -> list[tuple[int, float]]:
    """A loss that falls from `start` and ends at `value`; none for a job without one."""
    if value is None:
        return [(0, start)]
    fall = [math.exp(-step / 45) for step in STEPS]
    noise = random.Random(seed)
    shape = [(part - fall[-1]) / (1 - fall[-1]) for part in fall]
    return [
        (step, value + (start - value) * part + (noise.gauss(0, 0.01) if 0 < step < STEPS[-1] else 0))
        for step, part in zip(STEPS, shape, strict=True)
    ]


def loss_of(lr_A: float, lr_B: float, seed: int = 0, noise: float = 0.004) -> float:
    """A made-up loss that is best near lr_A 5e-4 and lr_B 4e-3, with the seed's noise."""
    far = 0.035 * math.log(lr_A / 5e-4) ** 2 + 0.06 * math.log(lr_B / 4e-3) ** 2
    return 3.62 + min(far, 1.5) + random.Random(f"{seed} {lr_A} {lr_B}").gauss(0, noise)


def write_sweep(folder: Path, **written: Any) -> Path:
    """sweep.json, as a sweep writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(written))
    return folder


def ratio_sweep(folder: Path, values: Values, **job: Any) -> SweepResults:
    """The results of a sweep over the ratio and the seed, with a folder a job."""
    for (ratio, seed), value in values.items():
        write_job(folder / f"{ratio}_{seed}", {"loraplus.ratio": ratio, "seed": seed}, value, **job)
    return results_of(folder)
