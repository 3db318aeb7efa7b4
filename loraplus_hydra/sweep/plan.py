"""What a sweep is before its first job: which keys it varies, its name and folder, and the command that began it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from loraplus_hydra.config.hydra_job import quoted
from loraplus_hydra.config.identity import config_hash
from loraplus_hydra.config.schema import NOT_OF_A_RUN
from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io.files import refuse_unwritable, write_text
from loraplus_hydra.io.read import Unreadable, read_json
from loraplus_hydra.report.read_sweep import SWEEP
from loraplus_hydra.sweep import job_status
from loraplus_hydra.sweep.names import sweep_name

_GOOD_NAME = re.compile(r"[\w+-][\w.+-]*")


@dataclass(frozen=True)
class Sweep:
    """A sweep that has begun."""

    folder: Path
    swept: tuple[str, ...]  # the keys that it varies
    start: job_status.Start  # what this start of it notes of its jobs
    is_new: bool  # whether the folder wasn't there before


def begin(config: DictConfig, words: list[str]) -> Sweep:
    """Give the sweep its folder, tell its jobs of it, and write sweep.json.

    `config` is the program's, as Hydra composed it for the sweep; `words` is the command line behind the program's
    name. What the jobs need is added to Hydra's own overrides, from which every launcher composes each job's config.
    """
    swept = swept_overrides(config)
    keys = _keys(swept)
    with open_dict(config):
        config.sweep.name = _checked(config.sweep.name) or default_name(config, swept)
        folder = Path(config.hydra.sweep.dir).expanduser().absolute()
        config.hydra.sweep.dir = str(folder)
    refuse_unwritable(folder, key="hydra.sweep.dir")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    start = job_status.begin(folder)
    # A relative folder starts where the command was given; workers may start elsewhere.
    config.hydra.overrides.hydra.extend(
        [
            f"hydra.sweep.dir={quoted(str(folder))}",
            f"hydra.callbacks.before_run.swept=[{','.join(map(quoted, keys))}]",
            f"hydra.callbacks.before_run.start={quoted(start.name)}",  # 12e456789012 would be a number
        ]
    )
    earlier = [key for key in _swept_before(folder) if key not in keys]
    told = {
        "name": folder.name,
        "command": shlex.join(["python", "-m", "loraplus_hydra", *words]),
        "swept": [*keys, *earlier],  # of a folder that several commands have filled
    }
    write_text(folder / SWEEP, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    return Sweep(folder, keys, start, is_new)


def swept_overrides(config: DictConfig) -> list[Override]:
    """The overrides with several values: those of the command line, and of `hydra.sweeper.params` behind them."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [*(f"{key}={value}" for key, value in params.items()), *_texts(config, "task")]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # glob(*) asks it
    # Of two for the same key the later one counts, as in Hydra's own sweepers.
    by_key = {override.get_key_element(): override for override in parser.parse_overrides(texts)}
    return [override for override in by_key.values() if override.is_sweep_override()]


def default_name(config: DictConfig, swept: list[Override]) -> str:
    """The swept keys and a hash of everything else: so the same sweep, or one with more values, has the same folder."""
    keys = _keys(swept)
    whole = OmegaConf.to_container(config, resolve=False)  # in it a swept group is as if it weren't chosen
    assert isinstance(whole, dict)
    rest = {str(key): value for key, value in whole.items() if key not in NOT_OF_A_RUN}
    for key in keys:
        _remove(rest, key.replace("/", "."))
    # Where a whole group is swept, it is gone from `rest`, and what is set inside it for all jobs with it.
    inside = [text for text in _texts(config, "task") if text.lstrip("+~").startswith(tuple(f"{key}." for key in keys))]
    return sweep_name(keys, config_hash({"swept": keys, "config": rest, "inside": sorted(inside)}))


def _keys(swept: list[Override]) -> tuple[str, ...]:
    """The swept keys in an order of their own, the seed last: theirs on the command line makes no other name."""
    keys = {override.key_or_group for override in swept}
    return tuple(sorted(keys, key=lambda key: (key == "seed", key)))


def _texts(config: DictConfig, part: str) -> list[str]:
    """Overrides of one kind as they were given: one may have an interpolation in it, which is the jobs'."""
    texts = OmegaConf.to_container(config.hydra.overrides[part], resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]


def _remove(config: dict[str, Any], key: str) -> None:
    *above, last = key.split(".")
    node: Any = config
    for name in above:
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)


def _checked(name: str | None) -> str | None:
    if name is not None and not _GOOD_NAME.fullmatch(name):
        fix = "letters, digits, '.', '_', '+' and '-'; for a folder elsewhere set hydra.sweep.dir"
        raise ConfigErrors([Problem("sweep.name", f"'{name}' is no name for a folder", fix)])
    return name


def _swept_before(folder: Path) -> list[str]:
    try:
        swept = read_json(folder / SWEEP).get("swept")
    except Unreadable:
        return []
    return swept if isinstance(swept, list) else []
