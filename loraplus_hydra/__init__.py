"""LoRA+ (arXiv 2402.12354) for PEFT adapters, driven by Hydra: lora_B learns faster than lora_A, by a ratio.

What others import from here is loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplus_hydra.job import run
    from loraplus_hydra.optimizer import create_loraplus_optimizer, group_parameters
    from loraplus_hydra.training import LoraPlus, LoraPlusMixin, with_loraplus

__version__ = "0.1.0"

_HOMES = {
    "create_loraplus_optimizer": "loraplus_hydra.optimizer",
    "group_parameters": "loraplus_hydra.optimizer",
    "LoraPlus": "loraplus_hydra.training",
    "LoraPlusMixin": "loraplus_hydra.training",
    "with_loraplus": "loraplus_hydra.training",
    "run": "loraplus_hydra.job",
}
__all__ = [
    "LoraPlus",
    "LoraPlusMixin",
    "__version__",
    "create_loraplus_optimizer",
    "group_parameters",
    "run",
    "with_loraplus",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
