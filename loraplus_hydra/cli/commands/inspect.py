"""`inspect`: every trained tensor's role, rule, group and rate, and the memory they take, without loading weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.check import check_without_data
from loraplus_hydra.loraplus.advice import ratio_advice
from loraplus_hydra.loraplus.memory import estimate
from loraplus_hydra.loraplus.plan import Plan, table_rows
from loraplus_hydra.runs import display
from loraplus_hydra.training.measure import count_parameters
from loraplus_hydra.training.prepare import plan_on_meta


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Print the table of a config's tensors; `--tensors` lists each one with its reason, `--json` is for machines."""
    check_without_data(config)
    model, plan = plan_on_meta(config)
    trained, total = count_parameters(model)
    memory = estimate(model, plan, quantization_of(config))
    advice = ratio_advice(plan.records, plan.largest_ratio, total)
    if "json" in flags:
        memory_bytes = asdict(memory) | {"total": memory.total}
        print(json.dumps(_as_json(plan, memory_bytes, advice, trained, total), indent=2))
        return
    display.show_rates(table_rows(plan))
    if "tensors" in flags:
        display.show_tensors(plan.tensors)
    display.show_memory(memory, trained, total)
    for sentence in advice:
        print(f"Note: {sentence}")


def quantization_of(config: DictConfig) -> dict[str, Any]:
    """The quantization group as a plain mapping, empty where there is none."""
    node = config.get("quantization")
    plain = OmegaConf.to_container(node, resolve=True) if node is not None else {}
    return plain if isinstance(plain, dict) else {}  # type: ignore[return-value]


def _as_json(plan: Plan, memory: dict[str, Any], advice: Sequence[str], trained: int, total: int) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in table_rows(plan)],
        "tensors": [
            {
                **tensor.as_dict(),
                "owner": tensor.record.owner,
                "state_bits": None if tensor.state is None else tensor.state.bits,
                "why": tensor.reason(),
            }
            for tensor in plan.tensors
        ],
        "memory_bytes": memory,
        "trained_parameters": trained,
        "total_parameters": total,
        "advice": list(advice),
    }
