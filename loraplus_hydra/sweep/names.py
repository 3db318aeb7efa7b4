"""Folder names of sweeps and jobs, safe for file systems, shells and Hydra's grammar."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loraplus_hydra.config.plain import without_credentials
from loraplus_hydra.report.formatting import names as short_names
from loraplus_hydra.report.formatting import short

HASH_DIGITS = 8
_LONGEST = 120  # bytes of the readable part; file systems allow 255 bytes for a name
# Characters with a special meaning in a shell, a file system or Hydra's grammar. Without them, `resume FOLDER` needs no
# quotes.
_UNSAFE = re.compile(r"[^A-Za-z0-9.+_-]+")


def job_name(varied: Mapping[str, Any], config_hash: str) -> str:
    """Return a job's folder name: the job's varied values, and a hash.

    {"loraplus.ratio": 4.0, "seed": 1} -> ratio-4_seed-1_3fa9c1d2
    """
    keys = short_names(list(varied))
    return _name((f"{keys[key]}-{_text(value)}" for key, value in varied.items()), "job", config_hash)


def sweep_name(swept: Iterable[str], config_hash: str) -> str:
    """Return a sweep's folder name: the swept keys, and a hash of all other settings.

    ["loraplus.ratio"] -> ratio_5b1e09aa
    """
    return _name(short_names(list(swept)).values(), "sweep", config_hash)


def _name(parts: Iterable[str], default: str, config_hash: str) -> str:
    readable = _UNSAFE.sub("-", "_".join(parts))[:_LONGEST].strip(".-_") or default
    return f"{readable}_{config_hash[:HASH_DIGITS]}"


def _text(value: Any) -> str:
    value = without_credentials(value)  # pages and trackers show the name
    if isinstance(value, (dict, list)):
        return _UNSAFE.sub("-", json.dumps(value, default=str)).strip("-")
    if value is None:
        return "null"
    readable = isinstance(value, float) and math.isfinite(value)
    return short(value) if readable or isinstance(value, bool) else str(value)
