"""One of two processes: wrap a model in DDP, FSDP1 or FSDP2 and write each tensor's rate after a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch import nn
from transformers import Trainer, TrainingArguments

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import register
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.adapter_files import save_factors
from loraplus_hydra.models.base_model import load_model
from loraplus_hydra.training.hf_trainer.loraplus_mixin import with_loraplus
from loraplus_hydra.training.hf_trainer.whole_tensors import collect_shards
from loraplus_hydra.training.prepare import loraplus_settings


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        # use_orig_params: frozen and trained weights may share a flat one
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def write_rates(how: str, folder: str, out: str) -> None:
    """Write OUT/<how>.json, each tensor's rate, for the model in `folder`; `how` is ddp, fsdp1 or fsdp2."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        config: Any = compose(
            "config", overrides=["model=hub", f"model.path={folder}", "adapter=dora", "loraplus.ratio=16"]
        )
    model = add_adapter(load_model(config.model, config.task.auto_class), config.adapter, config.task.task_type)
    arguments = TrainingArguments(output_dir=f"{out}/trainer", use_cpu=True, report_to="none")
    trainer: Any = with_loraplus(Trainer)(model=model, args=arguments, loraplus=loraplus_settings(config))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sharded = wrapped(model, how)
    if how == "fsdp2":
        whole = collect_shards(sharded)  # every process must take part
        assert all(tensor.equal(before[name]) for name, tensor in whole.items())
        assert whole.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if dist.get_rank() == 0:
            save_factors(model, Path(out, "adapter"), state_dict=whole)
    optimizer = trainer.create_optimizer(sharded)
    ids = torch.arange(12)[None] + dist.get_rank()
    sharded(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    own = {id(parameter) for parameter in sharded.parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert id(parameter) in own, f"{name} is not the wrapped model's"
            rates[name] = group["lr"]
    if dist.get_rank() == 0:
        Path(out, f"{how}.json").write_text(json.dumps(rates))
    dist.barrier()
    dist.destroy_process_group()
