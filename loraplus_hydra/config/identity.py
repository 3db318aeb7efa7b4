"""Hashes that identify a config."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from omegaconf import DictConfig

from loraplus_hydra.config.plain import plain_of

ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")  # whose product is the rows of a step
ALLOW = "allow_changed_inputs"  # a key that doesn't change the training
FORGETTING = "forgetting"


def run_hash(config: DictConfig) -> str:
    """Return the `config_hash` of a run's config. It is the same for a new and a resumed run."""
    resolved = plain_of(config)
    resolved.pop(ALLOW, None)
    if resolved.get(FORGETTING) is None:  # a run of a version without this key has the same hash
        resolved.pop(FORGETTING, None)
    if isinstance(trainer := resolved.get("trainer"), dict):
        trainer.pop("resume_from_checkpoint", None)
        # How a step's rows are divided is found on the machine. config.yaml has what was found
        if trainer.get("auto_batch") is True:
            trainer["rows"] = [trainer.pop(name, 1) for name in ROWS]
            if all(isinstance(number, int) for number in trainer["rows"]):
                trainer["rows"] = math.prod(trainer["rows"])
    return config_hash(resolved)


def config_hash(resolved: Any) -> str:
    """Return twelve hex digits that identify a resolved config. The order of keys does not matter."""
    text = json.dumps(resolved, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
