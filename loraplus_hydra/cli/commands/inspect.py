"""`inspect`: every trained tensor's role, rule, group and rate, and the memory they take, without loading weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.check import check_without_data
from loraplus_hydra.loraplus.plan import Placed, largest_ratio, rows
from loraplus_hydra.runs import display
from loraplus_hydra.training.prepare import placed_on_meta


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the table of a config's tensors; `--tensors` lists each one with its reason, `--json` is for machines."""
    check_without_data(config)
    model, placed = placed_on_meta(config)
    from loraplus_hydra.loraplus.advice import ratio_advice
    from loraplus_hydra.loraplus.memory import estimate
    from loraplus_hydra.training.measure import count_parameters

    trained, total = count_parameters(model)
    memory = estimate(model, placed, quantization_of(config))
    advice = ratio_advice([one.record for one in placed], largest_ratio(placed), total)
    if "json" in flags:
        print(json.dumps(_as_json(placed, asdict(memory) | {"total": memory.total}, advice, trained, total), indent=2))
        return
    display.show_overview(rows(placed))
    if "tensors" in flags:
        display.show_tensors(placed)
    display.show_memory(memory, trained, total)
    for sentence in advice:
        print(f"Note: {sentence}")


def quantization_of(config: DictConfig) -> dict[str, Any]:
    """The quantization group as a plain mapping, empty where there is none."""
    node = config.get("quantization")
    plain = OmegaConf.to_container(node, resolve=True) if node is not None else {}
    return plain if isinstance(plain, dict) else {}  # type: ignore[return-value]


def _as_json(
    placed: Sequence[Placed], memory: dict[str, Any], advice: Sequence[str], trained: int, total: int
) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in rows(placed)],
        "tensors": [
            {
                "name": one.record.name,
                "role": one.record.role,
                "rule": one.rule.name,
                "group": one.group.name,
                "owner": one.record.owner,
                "shape": list(one.record.shape),
                "lr": one.group.lr,
                "weight_decay": one.group.weight_decay,
                "state_bits": one.state_bits,
                "why": one.why(),
            }
            for one in placed
        ],
        "memory_bytes": memory,
        "trained_parameters": trained,
        "total_parameters": total,
        "advice": list(advice),
    }
