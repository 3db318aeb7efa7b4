"""One of two processes: norms around a step of a wrapped model beside those of the same model, unwrapped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from loraplus_hydra.training.step_norms import StepNorms


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 15), nn.Linear(15, 3))  # 15 rows: shards of unlike sizes


def wrapped(how: str) -> nn.Module:
    model = plain()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh)


def norms(model: nn.Module) -> dict[str, Any]:
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"name": "weights", "params": weights}, {"name": "biases", "params": biases, "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    model(torch.ones(4, 8)).square().sum().backward()
    before = StepNorms(optimizer, model)
    optimizer.step()
    return before.norms()


def write_norms(out: str) -> None:
    """Write OUT/<wrapper>-<rank>.json of each wrapper: [wrapped, unwrapped]."""
    dist.init_process_group("gloo")
    for how in ("ddp", "fsdp1", "fsdp2"):
        both = [norms(wrapped(how)), norms(copy.deepcopy(plain()))]
        Path(out, f"{how}-{dist.get_rank()}.json").write_text(json.dumps(both))
    dist.barrier()
    dist.destroy_process_group()
