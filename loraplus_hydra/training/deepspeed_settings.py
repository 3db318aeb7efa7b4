"""DeepSpeed's settings: as one mapping, with the values that the Trainer's arguments already have."""

from __future__ import annotations

import json
from typing import Any

from loraplus_hydra.config.locations import expanded

TRAINERS_OWN = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""DeepSpeed's key -> the field of the Trainer's arguments with the same meaning."""


def read_settings(given: Any) -> dict[str, Any]:
    """Return the settings, read from a JSON file if `given` is its name.

    Raises OSError or ValueError for a file that can't be read, or that contains no mapping.
    """
    read = json.loads(expanded(given).read_text(encoding="utf-8")) if isinstance(given, str) else given
    if not isinstance(read, dict):
        raise ValueError(f"{given} doesn't contain a mapping")
    return read


def complete_settings(given: Any) -> dict[str, Any]:
    """Return the settings, with "auto" for each key of TRAINERS_OWN that is left out.

    The Trainer then fills in its own values. Without a key, DeepSpeed's default holds: no clipping, for example.
    """
    return dict.fromkeys(TRAINERS_OWN, "auto") | read_settings(given)
