"""LoRA+ (arXiv 2402.12354) for PEFT adapters, driven by Hydra.

lora_B gets a larger learning rate than lora_A. Public names are loaded on first use, so importing the package is cheap.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplus_hydra.loraplus.optimizer import create_loraplus_optimizer, group_parameters
    from loraplus_hydra.loraplus.presets import preset_rules
    from loraplus_hydra.loraplus.settings import LoraPlus
    from loraplus_hydra.runs.job import run
    from loraplus_hydra.training.hf_trainer.loraplus_mixin import LoraPlusMixin, with_loraplus

__version__ = "0.2.0"

_HOMES = {
    "create_loraplus_optimizer": "loraplus_hydra.loraplus.optimizer",
    "group_parameters": "loraplus_hydra.loraplus.optimizer",
    "LoraPlus": "loraplus_hydra.loraplus.settings",
    "LoraPlusMixin": "loraplus_hydra.training.hf_trainer.loraplus_mixin",
    "with_loraplus": "loraplus_hydra.training.hf_trainer.loraplus_mixin",
    "preset_rules": "loraplus_hydra.loraplus.presets",
    "run": "loraplus_hydra.runs.job",
}
__all__ = [
    "LoraPlus",
    "LoraPlusMixin",
    "__version__",
    "create_loraplus_optimizer",
    "group_parameters",
    "preset_rules",
    "run",
    "with_loraplus",
]

# PEFT imports bitsandbytes, which warns on import if an optional kernel is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
