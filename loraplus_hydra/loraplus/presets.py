"""The presets of `conf/loraplus` as rules, for use without Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

from loraplus_hydra.config.locations import config_folder, options_of
from loraplus_hydra.errors import UserError, nearest
from loraplus_hydra.loraplus.grouping import check_rate
from loraplus_hydra.loraplus.rules import Rule, parse_rules

_REFERENCE = re.compile(r"\$\{\.+([\w.]+)\}")  # a relative interpolation, such as ${...ratio}
_OPTIMIZER_LR = "optimizer.lr"


def preset_rules(name: str = "default", *, lr: float | None = None, **values: float) -> list[Rule]:
    """Return the rules of a preset: `preset_rules("default", ratio=8)`.

    `values` override the preset's own keys, such as `ratio` and `lr_embedding`. `lr` is the optimizer's rate; the
    preset `absolute` uses it as the default of `lr_A`. Raises UserError if the preset or a key doesn't exist, or if a
    rate is infinite, NaN, 0 or negative.
    """
    presets = options_of("loraplus")
    if name not in presets:
        raise UserError(f"there is no preset '{name}'{nearest(name, presets)}; the presets are {', '.join(presets)}")
    content = yaml.safe_load((config_folder() / "loraplus" / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = {key: value for key, value in content.items() if key not in ("rules", "extra_rules")}
    for key, value in values.items():
        if key not in keys:
            offered = ", ".join(keys) or "no keys"
            raise UserError(f"preset '{name}' has no key '{key}'{nearest(key, keys)}; it has {offered}")
        keys[key] = check_rate(value, key)
    if lr is not None:
        keys[_OPTIMIZER_LR] = check_rate(lr, "lr")
    return parse_rules(_resolved(content["rules"], keys, name))


def _resolved(node: Any, keys: Mapping[str, Any], preset: str) -> Any:
    """Return `node` with each interpolation replaced by its value."""
    if isinstance(node, dict):
        return {key: _resolved(value, keys, preset) for key, value in node.items()}
    if not isinstance(node, str) or not (reference := _REFERENCE.fullmatch(node)):
        return node
    if reference[1] == _OPTIMIZER_LR and _OPTIMIZER_LR not in keys:
        raise UserError(f"preset '{preset}' needs the optimizer's rate: pass lr=...")
    return _resolved(keys[reference[1]], keys, preset)
