"""The presets of conf/loraplus as rules, read as Hydra would: beside an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from loraplus_hydra.loraplus.rules import Rule, parse_rules

CONF = Path(__file__).parents[2] / "conf"
LR = 1e-3


def preset(name: str, **keys: Any) -> list[Rule]:
    """Rules of preset `name` with `keys` (`ratio=4`) changed, at an optimizer's lr of `LR`."""
    config = OmegaConf.create({"optimizer": {"lr": LR}, "loraplus": OmegaConf.load(CONF / "loraplus" / f"{name}.yaml")})
    OmegaConf.set_struct(config, True)
    for key, value in keys.items():
        OmegaConf.update(config, f"loraplus.{key}", value)
    plain = OmegaConf.to_container(config.loraplus, resolve=True)
    return parse_rules(plain["rules"])  # type: ignore[index,call-overload]


def arguments(group: str, name: str) -> dict[str, Any]:
    """The keys of one YAML of a config group, beside a model whose lr is `LR`."""
    config = OmegaConf.create({"model": {"lr": LR}, group: OmegaConf.load(CONF / group / f"{name}.yaml")})
    return OmegaConf.to_container(config[group], resolve=True)  # type: ignore[return-value]
