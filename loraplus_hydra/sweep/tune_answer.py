"""The answer of `tune`: tune.json, and the winner's rates as a YAML file to compose."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf

from loraplus_hydra.io import screen
from loraplus_hydra.io.files import write_text
from loraplus_hydra.io.folders import make_folder
from loraplus_hydra.io.read import read_json, read_or
from loraplus_hydra.io.run_folder import SWEEP, TUNE, TUNED
from loraplus_hydra.io.rungs import Rung
from loraplus_hydra.loraplus.advice import short_run_notes
from loraplus_hydra.report.edges import as_text, next_value
from loraplus_hydra.report.formatting import count, measured, short, with_spread
from loraplus_hydra.sweep import tuning
from loraplus_hydra.sweep.halving_search import Search
from loraplus_hydra.sweep.tuning import Candidate, Settings, Verdict

LOSS = "eval_loss"
_PROGRAM = ["python", "-m", "loraplus_hydra"]


@dataclass(frozen=True)
class Finalist:
    """A candidate at half of the steps, with its metric for each seed."""

    name: str
    candidate: Candidate
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


@dataclass
class Answer:
    """The decision of a search, and all that led to it."""

    settings: Settings
    named: Mapping[str, Candidate]  # name in the search -> candidate
    search: Search
    step: int = 0  # at which the finalists are compared
    metric: str = ""  # by which they are compared
    greater_is_better: bool = False  # its direction
    finalists: tuple[Finalist, ...] = ()  # the better one comes first
    verdict: Verdict | None = None  # None with a single finalist
    winner: str = ""
    has_failed: bool = False  # True if the winner failed after half of its steps

    def decide(self, step: int, rungs: Mapping[str, Sequence[Rung]]) -> str:
        """Compare the finalists at `step`, and return the winner's name. `rungs` has a rung for each seed."""
        has_metric = all(rung.metric is not None for each in rungs.values() for rung in each)
        greater = self.greater_is_better = has_metric and self.settings.greater_is_better
        found = [
            Finalist(name, self.named[name], tuple(_value(rung, has_metric=has_metric) for rung in each))
            for name, each in rungs.items()
        ]
        found.sort(key=lambda one: -one.mean if greater else one.mean)
        del found[tuning.FINALISTS :]
        self.step, self.metric, self.finalists = step, self.settings.metric if has_metric else LOSS, tuple(found)
        if len(found) > 1:
            self.verdict = tuning.verdict(found[0].values, found[1].values, greater_is_better=greater)
        if self.verdict is not None and not self.verdict.is_clear:
            found.sort(key=lambda one: one.candidate.ratio)  # of equal ratios, the better one stays first
        self.winner = found[0].name
        for sentence in self.sentences():
            screen.show(sentence)
        return self.winner

    @property
    def cost(self) -> float:
        """The steps taken so far, in units of one run."""
        return self.search.spent / self.search.steps

    def sentences(self) -> list[str]:
        """Return the answer in sentences. The first one names the winner."""
        failed = ["It failed after half of its steps; its folder has the error."] if self.has_failed else []
        edges = (edge for edge, _ in _edges(self))
        return [*_decision(self), *failed, *edges, *short_run_notes(self.search.steps)]


def write_answer(answer: Answer) -> None:
    """Write tune.json and the winner's YAML file into the sweep's folder.

    They replace those of an earlier search in the folder. Until then, the report doesn't show that search's answer.
    """
    folder, settings = answer.search.folder, answer.settings
    winner = answer.named[answer.winner]
    content = {
        "command": _command(answer),  # of this search, as in sweep.json
        "answer": [*answer.sentences(), _cost_sentence(answer)],  # the answer in sentences
        "extend": _extending_command(answer),  # the command that searches beyond the grid's edge; empty without an edge
        "winner": {  # eta_A, eta_B, ratio and overrides of the winner, and the folder of its job
            **asdict(winner),
            "eta_A": winner.eta_A,
            "overrides": list(settings.overrides(winner)),
            "job": answer.search.folder_of(answer.winner),
        },
        "finalists": [  # the better one first, each with its value for each seed
            {"name": one.name, **asdict(one.candidate), "values": list(one.values)} for one in answer.finalists
        ],
        "compared_by": answer.metric,  # the metric by which the finalists are compared
        "greater_is_better": answer.greater_is_better,  # its direction
        "step": answer.step,  # the step at which they are compared
        "seeds": list(settings.seeds),  # the seeds with which they are compared
        # the difference of the two; null with a single finalist
        "verdict": answer.verdict and {**asdict(answer.verdict), "is_clear": answer.verdict.is_clear},
        "cost": answer.cost,  # steps of the search, in units of one run
        "budget": settings.budget,  # tune.budget
        "steps": answer.search.steps,  # steps of one run
        "candidates": [  # all pairs of eta_B and ratio that were tried
            {"name": name, **asdict(one), "overrides": list(settings.overrides(one))}
            for name, one in answer.named.items()
        ],
        "rungs": [*answer.search.rungs(), _last_rung(answer)],  # the decision at each rung, as in halving.json
    }
    write_text(folder / TUNE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    make_folder(folder / TUNED)
    write_text(folder / TUNED / "tuned.yaml", _winner_yaml(answer))


def _last_rung(answer: Answer) -> dict[str, Any]:
    """Return the finalists' means over the seeds in the form of a rung."""
    value = "loss" if answer.metric == LOSS else "metric"
    standings = [{"name": one.name, value: one.mean, "stays": one.name == answer.winner} for one in answer.finalists]
    return {"step": answer.step, "keep": 1, "candidates": standings}


def _value(rung: Rung, *, has_metric: bool) -> float:
    return rung.metric if has_metric and rung.metric is not None else rung.loss


def _decision(answer: Answer) -> Iterator[str]:
    settings, winner = answer.settings, answer.named[answer.winner]
    overrides = " ".join(settings.overrides(winner))
    rates = f"eta_B {short(winner.eta_B)} at ratio {short(winner.ratio)} ({overrides})"
    verdict = answer.verdict
    if verdict is None:
        yield f"Best: {rates}, the only finalist without a failed job."
        return
    first, second = answer.finalists
    same = first.candidate.ratio == second.candidate.ratio
    unclear = f"No clear winner, so the {'better finalist' if same else 'finalist with the smaller ratio'} is trained"
    yield f"{'Best' if verdict.is_clear else unclear}: {rates}."
    seeds = count(len(settings.seeds), "seed")
    yield (
        f"At step {answer.step:,} of {answer.search.steps:,}, {answer.metric} of {_label(first)} is "
        f"{measured(first.mean)}, and better than that of {_label(second)} by "
        f"{with_spread(verdict.difference, verdict.error)} (paired over {seeds}, ± standard error)."
    )
    yield (
        f"A clear difference is more than {verdict.quantile:.1f} standard errors "
        f"({short(verdict.quantile * verdict.error)}), and more than one candidate's own spread over the seeds "
        f"({short(verdict.spread)})."
    )
    yield "Rate and ratio are tied: what counts is mostly eta_B = lr x ratio. With another ratio, keep this product."


def _label(finalist: Finalist) -> str:
    return f"eta_B {short(finalist.candidate.eta_B)} at ratio {short(finalist.candidate.ratio)}"


def _cost_sentence(answer: Answer) -> str:
    tried = count(len(answer.named), "candidate")
    return f"The search of {tried} took the steps of {answer.cost:.1f} runs; the budget is {answer.settings.budget:g}."


def _edges(answer: Answer) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield (sentence, {key: next value}) for each axis at whose edge the winner is."""
    winner = answer.named[answer.winner]
    rates, ratios = ({getattr(one, name) for one in answer.named.values()} for name in ("eta_B", "ratio"))
    for name, key, best, values in (
        ("eta_B", "tune.eta_B", winner.eta_B, rates),
        ("ratio", "tune.ratios", winner.ratio, ratios),
    ):
        upper = best == max(values)
        # Plain LoRA, ratio 1, is the natural bound below
        if not upper and (best != min(values) or (name == "ratio" and best <= 1)):
            continue
        following = next_value(values, upper=upper)
        if following is not None:
            following = float(f"{following:.2g}")
            size = "largest" if upper else "smallest"
            yield (
                f"At the grid's edge: {name} {short(best)} is the {size} value. Extend to {as_text(following)}.",
                {key: following},
            )


def _extending_command(answer: Answer) -> str:
    """Return the command that searches beyond the edges too; empty without an edge."""
    more: dict[str, float] = {}
    for _, following in _edges(answer):
        more |= following
    words = shlex.split(_command(answer))[len(_PROGRAM) :]
    if not more or not words:
        return ""
    axes = {
        key: sorted({getattr(one, name) for one in answer.named.values()} | ({more[key]} if key in more else set()))
        for key, name in (("tune.eta_B", "eta_B"), ("tune.ratios", "ratio"))
    }
    number = len(axes["tune.eta_B"]) * len(axes["tune.ratios"])
    # Both the planned cost and that of the real rungs must be within it
    planned, search = answer.settings.cost_of(number), answer.search
    real = tuning.cost(number, len(answer.settings.seeds), search.steps, search.earliest)
    needed = max(answer.settings.budget, planned, real)
    given = {
        **{key: f"[{','.join(map(as_text, values))}]" for key, values in axes.items()},
        "tune.budget": f"{math.ceil(100 * needed) / 100:g}",
    }
    kept = [word for word in words if word.lstrip("+").partition("=")[0] not in (*given, "hparams_search")]
    return shlex.join([*_PROGRAM, "tune", *kept, *(f"{key}={value}" for key, value in given.items())])


def _command(answer: Answer) -> str:
    return str(read_or({}, read_json, answer.search.folder / SWEEP).get("command") or "")


def _winner_yaml(answer: Answer) -> str:
    overrides = answer.settings.overrides(answer.named[answer.winner])
    folder = shlex.quote(str(answer.search.folder))
    return (
        f"# @package _global_\n# python -m loraplus_hydra --config-dir {folder} experiment=tuned\n"
        f"# The rates that `tune` chose, with the preset that they are for.\n"
        f"defaults:\n  - override /loraplus: {answer.settings.preset}\n  - _self_\n\n"
        f"{OmegaConf.to_yaml(OmegaConf.from_dotlist(list(overrides)))}"
    )
