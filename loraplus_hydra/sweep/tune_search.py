"""The batches of jobs of `tune`.

A halved search over eta_B and ratio leaves two finalists. They are compared over several seeds, and one is trained on.
Like in a halved grid, every decision follows from the jobs' own rungs.json, so the same command comes to the same
decisions after a kill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loraplus_hydra.check import check
from loraplus_hydra.check.values import shown
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import SEED as SEED_RANGE
from loraplus_hydra.config.schema import TuneConfig, run_of
from loraplus_hydra.config.types import POSITIVE, describe, field_types, mismatch
from loraplus_hydra.errors import Problem, UserError, first_line, nearest, refuse
from loraplus_hydra.io.folders import remove
from loraplus_hydra.io.run_folder import TUNE, TUNED
from loraplus_hydra.io.rungs import Rung
from loraplus_hydra.models import published_rate
from loraplus_hydra.sweep import tuning
from loraplus_hydra.sweep.halving_search import Overrides, Search, comparability_problems
from loraplus_hydra.sweep.plan import GRID, Sweep, swept_overrides
from loraplus_hydra.sweep.tune_answer import Answer, write_answer
from loraplus_hydra.sweep.tuning import LR, LR_A, LR_B, RATIO, SEED, Candidate, Settings

SWEEPER = "hydra_plugins.loraplus_halving.TuneSweeper"
RATIOS = (1.0, 4.0, 16.0)
_OTHER_FOLDER = (
    "jobs in this folder were trained without these rungs, so they can't be compared; choose another folder with "
    "sweep.name=..."
)
_ALL_FAILED = "all candidates failed, so there is nothing to compare; their folders have the errors"


def check_tuning(config: DictConfig) -> Settings:
    """Return the settings of a search.

    `config` is the whole config. Raises ConfigErrors before anything has been written.
    """
    published_rate.register()  # optimizer.lr may be `auto`
    refuse(_type_problems(config))
    refuse(_problems(config))
    run, wanted = run_of(config), config.tune
    ratios = wanted.ratios or (RATIOS if _has_ratio(run) else (1.0,))
    eta_B = wanted.eta_B or tuning.rates_around(
        _centre(run), tuning.number_of_rates(wanted.budget, len(set(ratios)), wanted.seeds)
    )
    settings = Settings(
        _keys(run),
        tuple(tuning.candidates(eta_B, ratios)),
        tuple(run.seed + place for place in range(wanted.seeds)),
        wanted.budget,
        str(run.task.metric),
        bool(run.task.greater_is_better),
        str(config.hydra.runtime.choices.get("loraplus")),
    )
    refuse(_cost_problems(settings))
    return settings


def check_candidate(settings: Settings, config: DictConfig) -> None:
    """Raise ConfigErrors if the config of a candidate, and so of all, has errors."""
    run = run_of(config).copy()
    for text in settings.overrides(settings.candidates[0]):
        key, _, value = text.partition("=")
        OmegaConf.update(run, key, float(value))
    check(run)


def use_tuning(config: DictConfig, sweep: Sweep) -> None:
    """Give the search its sweeper. `sweep` has begun."""
    with open_dict(config):
        grid: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
        config.hydra.sweeper = {**grid, "_target_": SWEEPER, "start": sweep.start.name}
    # The answer of an earlier search in this folder
    remove(sweep.folder / TUNE)
    remove(sweep.folder / TUNED)


def _type_problems(config: DictConfig) -> Iterator[Problem]:
    if not isinstance(config.tune, DictConfig):
        yield Problem("tune", f"{shown(config.tune)} is not a mapping of keys", "leave it out")
        return
    given = plain_of(config.tune)
    known = [*field_types(TuneConfig)]
    for key in (key for key in given if key not in known):
        yield Problem(
            f"tune.{key}", f"there is no such key{nearest(key, known)}", f"tune has the keys {', '.join(known)}"
        )
    for key, (annotation, limits) in field_types(TuneConfig).items():
        if why := mismatch(given.get(key), annotation, limits):
            yield Problem(f"tune.{key}", f"{shown(given.get(key))} {why}", f"it must be {describe(annotation, limits)}")


def _problems(config: DictConfig) -> Iterator[Problem]:
    for one in swept_overrides(config):
        fix = "give it one value, and run `tune` once for each"
        if one.key_or_group.startswith("tune."):
            fix = f"write a list: {one.key_or_group}=[1,4]"
        yield Problem(one.key_or_group, "`tune` makes its own grid, over rate and ratio", fix)
    if config.hydra.sweeper.get("_target_") not in (GRID, SWEEPER):  # the search's own, once it has begun
        yield Problem("hydra.sweeper", "`tune` is a search of its own", "use only one of them")
    if config.halving:
        yield Problem("halving", "`tune` halves its own grid", "leave it out")
    yield from comparability_problems(config)
    run = run_of(config)
    if config.tune.ratios and not _has_ratio(run) and list(config.tune.ratios) != [1]:
        yield Problem("tune.ratios", "this preset of loraplus has no ratio", "leave it out, or use loraplus=default")
    if config.tune.eta_B is None:
        try:
            _centre(run)
        except (UserError, OmegaConfBaseException, ValueError, TypeError) as error:
            yield Problem(
                "tune.eta_B",
                f"no rate to search around: {first_line(error.__cause__ or error)}",
                "give a list: [1e-3,4e-3]",
            )
    seed = OmegaConf.select(run, SEED)
    if mismatch(seed, int, SEED_RANGE) or not SEED_RANGE.holds(seed + config.tune.seeds - 1):
        yield Problem(SEED, f"'{seed}' and the seeds after it must be from 0 to 4294967295", "for example: seed=0")


def _cost_problems(settings: Settings) -> Iterator[Problem]:
    number = len(settings.candidates)
    if number < tuning.FINALISTS:
        yield Problem("tune", "there is nothing to compare", "give tune.eta_B or tune.ratios several values")
    elif settings.planned > settings.budget:
        what = f"{number} candidates and {len(settings.seeds)} seeds cost {settings.planned:.4g} runs"
        fix = f"use {math.ceil(settings.planned * 10) / 10:g} or more, or fewer values of tune.eta_B and tune.ratios"
        yield Problem("tune.budget", f"{what}, which is more than {settings.budget:g}", fix)


def _keys(run: DictConfig) -> tuple[str, ...]:
    if "lr_B" in run.loraplus:
        return (LR_A, LR_B)
    return (LR, RATIO) if "ratio" in run.loraplus else (LR,)


def _has_ratio(run: DictConfig) -> bool:
    return len(_keys(run)) > 1


def _centre(run: DictConfig) -> float:
    """Return eta_B of the config. Raises ValueError if it is not a number above 0."""
    keys = _keys(run)
    factors = (LR_B,) if LR_B in keys else keys
    values = [OmegaConf.select(run, key) for key in factors]
    if wrong := [key for key, value in zip(factors, values, strict=True) if mismatch(value, float, POSITIVE)]:
        raise ValueError(f"{wrong[0]} is not a number above 0")
    return float(math.prod(values))


def batches(settings: Settings, words: Sequence[str], folder: Path, start: str) -> Iterator[list[Overrides]]:
    """Yield the jobs that are launched together.

    `words` are the overrides that all jobs share. `folder` and `start` are the sweep's. A batch must have ended before
    the next one is taken. Raises UserError if the jobs can't be compared.
    """
    common = [text for text in words if text.lstrip("+").partition("=")[0] not in settings.swept]

    def jobs(candidate: Candidate, seeds: Sequence[int]) -> list[Overrides]:
        return [(*common, *settings.overrides(candidate), f"{SEED}={seed}") for seed in seeds]

    first = settings.seeds[:1]
    search = Search(
        [job for each in settings.candidates for job in jobs(each, first)],
        folder,
        start,
        greater_is_better=settings.greater_is_better,
    )
    named = dict(zip(search.candidates, settings.candidates, strict=True))
    answer = Answer(settings, named, search)
    yield from _narrow(search, settings)
    if not search.remaining:
        raise UserError(_ALL_FAILED)
    if not search.steps:
        raise UserError(_OTHER_FOLDER)
    for name in search.remaining:
        search.candidates[name] = jobs(named[name], settings.seeds)
    half = tuning.rung_step(tuning.HALF, search.steps, search.earliest)
    answer.extra_steps = len(search.remaining) * (len(settings.seeds) - 1) * half
    yield from search.batch_until(half)
    search.arrive(half)
    search.keep(answer.decide(half, _compared(search, half)))
    write_answer(answer)
    yield from search.batch(search.remaining)
    search.arrive(search.steps)
    write_answer(answer)


def _compared(search: Search, step: int) -> dict[str, list[Rung]]:
    """Return the rungs of all remaining candidates.

    Raises UserError if one of them was trained beyond the rung.
    """
    rungs = search.at_rung(step)
    if not search.remaining:
        raise UserError(_ALL_FAILED)
    if len(rungs) < len(search.remaining):
        raise UserError(_OTHER_FOLDER)
    return rungs


def _narrow(search: Search, settings: Settings) -> Iterator[list[Overrides]]:
    """Yield the batches until two candidates remain. All their steps are those of the first seed."""
    number = len(search.candidates)
    share = tuning.FIRST if number > tuning.FINALISTS else tuning.HALF
    yield from search.batch(search.remaining, share)
    for stop in search.plan(share, lambda steps, earliest: tuning.stops(number, steps, earliest)):
        if len(search.remaining) > stop.keep:
            yield from search.batch_until(stop.step)
            search.arrive(stop.step)
            _compared(search, stop.step)
            more = math.floor((settings.budget - settings.planned) / (tuning.SECOND - tuning.FIRST))
            search.decide(stop, 0 if stop.keep == tuning.FINALISTS else more)
