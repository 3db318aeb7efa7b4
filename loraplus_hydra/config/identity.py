"""Hashes that identify a config."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf


def run_hash(config: DictConfig) -> str:
    """The `config_hash` of a run's config: equal whether the run goes on from a checkpoint or begins."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    if isinstance(trainer := resolved.get("trainer"), dict):
        trainer.pop("resume_from_checkpoint", None)
    return config_hash(resolved)


def config_hash(resolved: Any) -> str:
    """Twelve hex digits that name a resolved config: equal for equal configs, whatever the order of their keys."""
    text = json.dumps(resolved, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
