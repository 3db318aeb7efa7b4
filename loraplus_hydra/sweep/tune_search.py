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
from loraplus_hydra.io.rungs import Rung
from loraplus_hydra.loraplus.plan import Plan
from loraplus_hydra.models import published_rate
from loraplus_hydra.sweep import tuning
from loraplus_hydra.sweep.halving_search import SWEEPER, Overrides, Search, comparability_problems
from loraplus_hydra.sweep.plan import GRID, Sweep, swept_overrides
from loraplus_hydra.sweep.tune_answer import Answer, write_answer
from loraplus_hydra.sweep.tuning import LR, LR_A, LR_B, RATIO, SEED, Candidate, Settings

RATIOS = (1.0, 4.0, 16.0)
_OTHER_FOLDER = (
    "jobs in this folder were trained without these rungs, so they can't be compared; choose another folder with "
    "sweep.name=..."
)
_ROUNDING = 0.1  # of rungs to whole steps, in runs
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
    steps = OmegaConf.select(run, "trainer.max_steps")
    steps = steps if type(steps) is int and steps > 0 else None
    eta_B = wanted.eta_B or tuning.rates_around(
        _centre(run), tuning.number_of_rates(wanted.budget, len(set(ratios)), wanted.seeds, steps)
    )
    settings = Settings(
        _keys(run),
        tuple(tuning.candidates(eta_B, ratios)),
        tuple(run.seed + place for place in range(wanted.seeds)),
        wanted.budget,
        str(run.task.metric),
        bool(run.task.greater_is_better),
        str(config.hydra.runtime.choices.get("loraplus")),
        steps,
    )
    refuse(_cost_problems(settings))
    return settings


def check_candidates(settings: Settings, config: DictConfig) -> None:
    """Raise ConfigErrors if the config of the candidates has errors.

    In a preset of your own, the keys must decide the rates of lora_A and lora_B.
    """
    # They differ in both axes; the rows are the same
    for candidate, with_data in ((settings.candidates[0], True), (settings.candidates[-1], False)):
        run = run_of(config).copy()
        for text in settings.overrides(candidate):
            key, _, value = text.partition("=")
            OmegaConf.update(run, key, float(value))
        refuse(_rate_problems(check(run, with_data=with_data).plan, candidate, settings))


def _rate_problems(plan: Plan, candidate: Candidate, settings: Settings) -> Iterator[Problem]:
    for role, rate in (("lora_A", candidate.eta_A), ("lora_B", candidate.eta_B)):
        found = sorted({tensor.group.lr for tensor in plan.tensors if tensor.record.role == role})
        if found and not any(math.isclose(lr, rate, rel_tol=1e-5) for lr in found):
            what = f"{role} trains at {found[0]:g} under the rules of loraplus, where `tune` asks for {rate:g}"
            fix = f"use loraplus=default, or rules whose rates follow from {' and '.join(settings.keys)}"
            yield Problem("loraplus.rules", what, fix)


def use_tuning(config: DictConfig, sweep: Sweep) -> None:
    """Give the search its sweeper. `sweep` has begun."""
    with open_dict(config):
        grid: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
        config.hydra.sweeper = {**grid, "_target_": SWEEPER, "start": sweep.start.name, "tune": True}


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
    for key in _keys(run):
        if OmegaConf.select(run, key) is None:
            yield Problem(key, "`tune` sets this key, but the config doesn't have it", "leave the override out")
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
        least = tuning.cost(tuning.FINALISTS, tuning.FEWEST_SEEDS, settings.steps)
        fix = (
            f"use {_rounded_up(settings.planned)} or more, or fewer values of tune.eta_B and tune.ratios; the least is "
            f"{_rounded_up(least)}, for {tuning.FINALISTS} candidates and tune.seeds={tuning.FEWEST_SEEDS}"
        )
        yield Problem("tune.budget", f"{what}, which is more than {settings.budget:g}", fix)


def _rounded_up(cost: float) -> str:
    return f"{math.ceil(cost * 10) / 10:g}"


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
    yield from search.batch_until(half)
    search.arrive(half)
    search.keep(answer.decide(half, _compared(search, half)))
    write_answer(answer)
    yield from search.batch(search.remaining)
    answer.has_failed = not search.is_done(answer.winner)
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
    yield from search.batch(search.remaining, tuning.FIRST)
    stops = search.plan(tuning.FIRST, lambda steps, earliest: tuning.stops(number, steps, earliest))
    left = settings.budget - _affordable_cost(search, settings) if search.steps else 0.0
    for stop in stops:
        yield from search.batch_until(stop.step)
        search.arrive(stop.step)
        if len(search.remaining) > stop.keep:
            _compared(search, stop.step)
            more = math.floor(left / (tuning.SECOND - tuning.FIRST))
            search.decide(stop, 0 if stop.keep == tuning.FINALISTS else max(0, more))


def _affordable_cost(search: Search, settings: Settings) -> float:
    """Return the cost with the rungs of these jobs. Raises UserError if it is above the budget.

    It is larger than planned if the rungs are late, in a short run or because of warm-up.
    """
    needed = tuning.cost(len(search.candidates), len(settings.seeds), search.steps, search.earliest)
    if needed <= settings.budget + _ROUNDING:
        return needed
    rates = ",".join(f"{rate:g}" for rate in sorted({one.eta_B for one in settings.candidates}))
    raise UserError(
        f"with {search.steps} steps and no rung before step {search.earliest}, this search costs {needed:.1f} runs, "
        f"and tune.budget is {settings.budget:g}. Give tune.budget={_rounded_up(needed)} "
        f"'tune.eta_B=[{rates}]', or fewer values; the steps so far are kept"
    )
