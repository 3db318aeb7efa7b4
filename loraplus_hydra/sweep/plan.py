"""The start of a sweep: its keys, name, folder and sweep.json."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from omegaconf import DictConfig, OmegaConf, open_dict

from loraplus_hydra.config.hydra_job import quoted
from loraplus_hydra.config.identity import ALLOW, config_hash
from loraplus_hydra.config.locations import expanded
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import NOT_OF_A_RUN
from loraplus_hydra.errors import ConfigErrors, Problem, refuse
from loraplus_hydra.io import interrupts, job_status
from loraplus_hydra.io.files import refuse_unwritable, write_text
from loraplus_hydra.io.folders import make_folder, refuse_links
from loraplus_hydra.io.read import read_json, read_or
from loraplus_hydra.io.run_folder import SWEEP
from loraplus_hydra.report.values import identity
from loraplus_hydra.sweep.names import sweep_name

GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_GOOD_NAME = re.compile(r"[\w+-][\w.+-]*")


@dataclass(frozen=True)
class Sweep:
    """A sweep that has begun."""

    folder: Path
    swept: tuple[str, ...]  # the keys that the sweep varies
    start: job_status.Start
    is_new: bool  # True if this start made the folder
    jobs: tuple[tuple[str, ...], ...] = ()  # the swept overrides of each job; empty if a search chooses them


def begin(config: DictConfig, words: list[str], keys: tuple[str, ...] | None = None) -> Sweep:
    """Make the sweep's folder, write sweep.json, and pass the jobs their overrides.

    `config` is the whole config that Hydra composed for the sweep. `words` is the command line after the program's
    name. `keys` are the swept keys of a search whose grid isn't on the command line. Raises ConfigErrors, also for a
    grid that lists a value twice.
    """
    swept = swept_overrides(config)
    refuse(_repeated(config, swept))
    is_search = keys is not None
    keys = _sorted_keys({one.key_or_group for one in swept}) if keys is None else _sorted_keys(keys)
    with open_dict(config):
        # Searches with another first seed have other folders, because their finalists skip the first rungs
        hidden, readable = (keys[:-1], ("tune",)) if is_search else (keys, keys)
        config.sweep.name = _checked_name(config.sweep.name) or default_name(config, hidden, readable)
        folder = expanded(config.hydra.sweep.dir).absolute()
        config.hydra.sweep.dir = str(folder)
    refuse_unwritable(folder, key="hydra.sweep.dir")
    refuse_links(folder, key="hydra.sweep.dir")  # also in the jobs' folders, before Hydra writes into them
    is_new = not folder.exists()
    make_folder(folder)
    start = job_status.begin(folder)
    # Every launcher composes each job's config from these overrides.
    config.hydra.overrides.hydra.extend(
        [
            f"hydra.sweep.dir={quoted(str(folder))}",  # absolute, because workers may start in another folder
            f"sweep.swept=[{','.join(map(quoted, keys))}]",
            f"sweep.start={quoted(start.name)}",  # quoted, because 12e456789012 would be a number
        ]
    )
    jobs = () if is_search else grid_of(config, swept)
    _write_sweep_file(folder, keys, words, len(jobs))
    interrupts.raise_at_once(config.hydra.launcher._target_ != _IN_THIS_PROCESS)
    return Sweep(folder, keys, start, is_new, jobs)


def write_left(sweep: Sweep, left: Iterable[Sequence[str]]) -> None:
    """Write the jobs that this start of the sweep has not begun into sweep.json."""
    stored = read_json(sweep.folder / SWEEP)
    stored["left"] = [shlex.join(overrides) for overrides in left]
    write_text(sweep.folder / SWEEP, json.dumps(stored, indent=2, ensure_ascii=False) + "\n")


def grid_of(config: DictConfig, swept: list[Override]) -> tuple[tuple[str, ...], ...]:
    """Return the swept overrides of each job, combined like in Hydra's own sweeper."""
    if not _is_grid(config):
        return ()
    values = ([f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()] for one in swept)
    return tuple(itertools.product(*values))


def _is_grid(config: DictConfig) -> bool:
    return bool(config.hydra.sweeper.get("_target_") == GRID)


def _repeated(config: DictConfig, swept: list[Override]) -> Iterator[Problem]:
    """Yield a Problem for each key with equal values, such as 1 and 1.0: their jobs would be the same run."""
    for one in swept if _is_grid(config) else ():
        seen: dict[str, str] = {}
        for value in one.sweep_iterator():
            text = Transformer.str(value)
            before = seen.setdefault(identity(Override._convert_value(value)), text)
            if before is not text:
                what = f"{before} is given twice" if before == text else f"{before} and {text} are the same value"
                yield Problem(one.key_or_group, what, "give each value once")


def swept_overrides(config: DictConfig) -> list[Override]:
    """Return the overrides with several values, from the command line and `hydra.sweeper.params`."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [*(f"{key}={value}" for key, value in params.items()), *_task_overrides(config)]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # glob(*) needs the loader
    # For the same key, the later override is used, like in Hydra's own sweepers: the command line overrides the params.
    by_key = {override.get_key_element(): override for override in parser.parse_overrides(texts)}
    return [override for override in by_key.values() if override.is_sweep_override()]


def default_name(config: DictConfig, keys: Sequence[str], readable: Sequence[str]) -> str:
    """Return a name from `readable` words and a hash of all settings but the swept keys.

    So the same sweep, also with more values, gets the same folder again.
    """
    whole = plain_of(config, resolve=False)  # without the options of swept groups
    rest = {key: value for key, value in whole.items() if key not in (*NOT_OF_A_RUN, ALLOW)}
    for key in keys:
        _remove(rest, key.replace("/", "."))
    # `rest` doesn't have the swept groups, nor the overrides inside these groups. The ones that aren't swept themselves
    # are the same for all jobs.
    prefixes = tuple(f"{key}." for key in keys)
    given = ((text.lstrip("+~").partition("=")[0], text) for text in _task_overrides(config))
    inside = [text for key, text in given if key.startswith(prefixes) and key not in keys]
    return sweep_name(readable, config_hash({"swept": keys, "config": rest, "inside": sorted(inside)}))


def _sorted_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the swept keys sorted, with the seed last."""
    return tuple(sorted(keys, key=lambda key: (key == "seed", key)))


def _task_overrides(config: DictConfig) -> list[str]:
    # Unresolved, because an interpolation in an override is resolved in each job.
    texts = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]


def _remove(config: dict[str, Any], key: str) -> None:
    *above, last = key.split(".")
    node: Any = config
    for name in above:
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)


def _checked_name(name: str | None) -> str | None:
    if name is not None and not _GOOD_NAME.fullmatch(name):
        fix = "use letters, digits, '.', '_', '+' and '-'; for a folder elsewhere set hydra.sweep.dir"
        raise ConfigErrors([Problem("sweep.name", f"'{name}' is not a valid folder name", fix)])
    return name


def _write_sweep_file(folder: Path, keys: tuple[str, ...], words: list[str], jobs: int) -> None:
    # Other commands may have run jobs in the folder
    earlier = [key for key in _swept_before(folder) if key not in keys]
    content = {
        "name": folder.name,  # the sweep's name
        "command": shlex.join(["python", "-m", "loraplus_hydra", *words]),  # the last command that started the sweep
        "swept": [*keys, *earlier],  # the swept keys
        **({"jobs": jobs} if jobs else {}),  # number of jobs; none for a search, which chooses its jobs later
    }
    write_text(folder / SWEEP, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _swept_before(folder: Path) -> list[str]:
    swept = read_or({}, read_json, folder / SWEEP).get("swept")
    return swept if isinstance(swept, list) else []
