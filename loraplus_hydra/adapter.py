"""The adapter: config -> PEFT config -> PeftModel, and what of the model an adapter could sit on."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from loraplus_hydra.build import instantiate

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def adapter_config(adapter: DictConfig | dict[str, Any], task_type: str | None) -> PeftConfig:
    """The PEFT config of `adapter`; `task_type` is the task's unless the adapter names one."""
    arguments = dict(adapter)
    arguments.setdefault("task_type", task_type)
    config: PeftConfig = instantiate(arguments)
    return config


def add_adapter(model: PreTrainedModel, adapter: DictConfig | dict[str, Any], task_type: str | None) -> PeftModel:
    """`model` with the adapter in place; only what the adapter trains has `requires_grad`."""
    from peft import get_peft_model

    peft_model: PeftModel = get_peft_model(model, adapter_config(adapter, task_type))  # type: ignore[assignment]
    return peft_model


def possible_targets(model: nn.Module) -> list[str]:
    """Last parts of the names of layers that LoRA can sit on, the most frequent first: q_proj, v_proj, ..."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    names = Counter(name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds))
    return [name for name, _ in names.most_common()]
