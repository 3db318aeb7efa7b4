"""The study's tables, from its log alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from benchmarks.claims_log import Grid, Line, Setting
from loraplus_hydra.report.formatting import short

PLAIN = 1  # the ratio of plain LoRA
_BEGIN, _END = "<!-- tables: begin -->", "<!-- tables: end -->"
_FACTORS = (1 / 10, 1 / 3, 3, 10)  # how far off a rate is
_UNSTABLE = 0.1  # a run that gains less than this share of the best run's gain is unstable
_FASTER = 1.5  # the smallest speedup that the claim promises
_SAME_MEMORY = 0.05  # the largest relative difference that counts as none


def tables(grids: Sequence[Grid]) -> str:
    """Return all tables as Markdown, with a section for each grid."""
    sections = [text for grid in grids for text in _section(grid)]
    return "\n\n".join([_progress(grids), *sections, "### The claims", claims_table(grids)])


def _section(grid: Grid) -> list[str]:
    heading = f"### {grid.title[0].upper()}{grid.title[1:]}"
    if not has_runs(grid):
        return [heading, f"0 of {grid.total} runs."]
    return [
        heading,
        _about(grid),
        f"![{grid.title}: all rates, best rates, curves](../images/{picture_of(grid)})",
        "Best against best, mean and standard deviation over the seeds:",
        best_table(grid),
        f"What a wrong rate costs: the relative loss of {grid.metric} against the ratio's best rate, with one seed.",
        regret_table(grid),
        "Steps to the final value of plain LoRA, seed by seed:",
        speed_table(grid),
        "The rate of lora_B for both factors, with one seed (the rate in brackets):",
        uniform_table(grid),
    ]


def has_runs(grid: Grid) -> bool:
    """Return True if a run of the grid has a metric."""
    return any(math.isfinite(value) for lr in grid.rates for ratio in grid.ratios for value in grid.values(lr, ratio))


def picture_of(grid: Grid) -> str:
    """Return the file name of a grid's picture."""
    return f"study_{grid.name}.png"


def with_tables(page: str, text: str) -> str:
    """Return a page with `text` between its two marks."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---:"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _progress(grids: Sequence[Grid]) -> str:
    lines = [line for grid in grids for line in grid.runs.values()]
    hours = sum(line["cpu_seconds"] for line in lines) / 3600
    done, total = len(lines), sum(grid.total for grid in grids)
    return f"{done} of {total} runs are in the log, from {hours:.1f} hours of CPU time{_machines(lines)}."


def _machines(lines: Sequence[Line]) -> str:
    found = dict.fromkeys(
        f"{line['processor']}, Python {line['versions']['python']}, torch {line['versions']['torch']}" for line in lines
    )
    return f" ({'; '.join(found)})" if found else ""


def _about(grid: Grid) -> str:
    """Return how much of a grid is done, and a warning if its runs can't be compared."""
    first = sum(1 for setting in grid.runs if setting.seed == grid.seeds[0])
    text = f"{len(grid.runs)} of {grid.total} runs: {first} of the {len(grid.rates) * len(grid.ratios)} of the grid"
    text += f" (seed {grid.seeds[0]}), {len(grid.runs) - first} with other seeds." if grid.best else "; one seed."
    if len({line["eval_rows"] for line in grid.runs.values()}) > 1:
        text += " **Not all runs were evaluated on the same rows, so their values must not be compared.**"
    return text


def number(grid: Grid, value: float) -> str:
    """Return a metric as text: an accuracy in percent, a loss with four decimals."""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.2%}" if grid.greater_is_better else f"{value:.4f}"


def _signed(grid: Grid, value: float) -> str:
    return f"{100 * value:+.2f} points" if grid.greater_is_better else f"{value:+.4f}"


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Return mean and standard deviation as text; the mean alone for one value."""
    mean = show(sum(values) / len(values))
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean
    return f"{mean} ± {show(statistics.stdev(values)).lstrip('+')}"


def ordered(grid: Grid) -> list[tuple[float, float]]:
    """Return the tried ratios in ascending order, each with its best rate.

    A ratio that always diverged is left out.
    """
    ranked = {ratio: grid.ranked(ratio) for ratio in sorted(grid.ratios)}
    return [
        (ratio, rates[0])
        for ratio, rates in ranked.items()
        if rates and math.isfinite(sum(grid.values(rates[0], ratio)))
    ]


def best_table(grid: Grid) -> str:
    """Return the table of each ratio's best rate."""
    heads = ["ratio", "best rate", "rates tried", grid.metric, "seeds", "minus plain LoRA"]
    best = ordered(grid)
    return _table(heads, [_best_row(grid, ratio, lr, dict(best).get(PLAIN)) for ratio, lr in best])


def _best_row(grid: Grid, ratio: float, lr: float, plain_lr: float | None) -> list[str]:
    values, tried = grid.values(lr, ratio), grid.ranked(ratio)
    edge = " (edge)" if lr in (min(tried), max(tried)) else ""
    gains = [] if plain_lr is None or ratio == PLAIN else differences(grid, ratio, lr, plain_lr)
    return [
        f"{short(ratio)}{' (plain LoRA)' if ratio == PLAIN else ''}",
        f"{short(lr)}{edge}",
        f"{len(tried)} of {len(grid.rates)}",
        spread(values, lambda value: number(grid, value)),
        str(len(values)),
        spread(gains, lambda value: _signed(grid, value)) if gains else "-",
    ]


def differences(grid: Grid, ratio: float, lr: float, plain_lr: float) -> list[float]:
    """Return a ratio's metric minus that of plain LoRA, for each seed that both have."""
    pairs = [(grid.value(Setting(lr, ratio, seed)), grid.value(Setting(plain_lr, PLAIN, seed))) for seed in grid.seeds]
    return [value - plain for value, plain in pairs if value is not None and plain is not None]


def regret_table(grid: Grid) -> str:
    """Return the table of what a wrong rate costs, with the first seed."""
    steps = [nearest(grid.rates, grid.rates[0], factor) for factor in _FACTORS if factor > 1]
    shown = ["-" if rate is None else f"{rate / grid.rates[0]:.3g}" for rate in steps]
    heads = ["ratio", "best rate", *(f"rate / {step}" for step in shown[::-1]), *(f"rate x {step}" for step in shown)]
    rows = []
    for ratio in sorted(grid.ratios):
        if tried := {lr: values for lr in grid.rates if (values := grid.first(lr, ratio))}:
            lr = min(tried, key=lambda lr: grid.loss(tried[lr]))
            rows.append([short(ratio), short(lr), *(_regret(grid, ratio, lr, factor) for factor in _FACTORS)])
    return _table(heads, rows)


def nearest(rates: Sequence[float], lr: float, factor: float) -> float | None:
    """Return the rate of the grid that is nearest to `lr` x `factor`; None if the grid ends before it."""
    rate = min(rates, key=lambda rate: abs(math.log(rate / (lr * factor))))
    step = max(math.log(upper / lower) for lower, upper in pairwise(rates))
    return rate if abs(math.log(rate / (lr * factor))) < step / 2 else None


def _regret(grid: Grid, ratio: float, lr: float, factor: float) -> str:
    """Return by how much the metric is worse than at the best rate, relative to it."""
    rate = nearest(grid.rates, lr, factor)
    if rate is None:
        return "-"
    if not (values := grid.first(rate, ratio)):
        return "missing"
    best = grid.first(lr, ratio)[0]
    return f"{grid.loss([values[0] - best]) / best:+.1%}" if math.isfinite(values[0]) else "diverged"


def speed_table(grid: Grid) -> str:
    """Return the table of the steps in which each ratio reaches the final metric of plain LoRA."""
    heads = [
        "ratio",
        "best rate",
        "reaches best plain LoRA at step",
        "times faster",
        "seeds",
        "than plain LoRA at its rate",
    ]
    best = ordered(grid)
    plain_lr = dict(best).get(PLAIN)
    steps = max(line["steps"] for line in grid.runs.values())
    rows = []
    for ratio, lr in best:
        if ratio == PLAIN or plain_lr is None:
            continue
        tuned = speedups(grid, ratio, lr, plain_lr)
        at = [steps / factor for factor in tuned if factor]
        shown = spread(at, lambda value: f"{value:.0f}") if at else "never"
        untuned = _times(speedups(grid, ratio, lr, lr))
        rows.append([short(ratio), short(lr), shown, _times(tuned), str(len(tuned)), untuned])
    return _table(heads, rows)


def _times(factors: Sequence[float | None]) -> str:
    """Return speedups as text. If not all seeds reach the target, also the number that do."""
    known = [factor for factor in factors if factor is not None]
    if not known:
        return "never" if factors else "missing"
    some = "" if len(known) == len(factors) else f" in {len(known)} of {len(factors)}"
    return f"{spread(known, lambda value: f'{value:.2f}')} x{some}"


def speedups(grid: Grid, ratio: float, lr: float, plain_lr: float) -> list[float | None]:
    """Return how many times fewer steps a ratio takes to plain LoRA's final metric.

    There is a number for each seed that both have. It is None if a run never reaches this metric.
    """
    found = []
    for seed in grid.seeds:
        target, line = grid.value(Setting(plain_lr, PLAIN, seed)), grid.runs.get(Setting(lr, ratio, seed))
        if target is not None and line is not None:
            step = reached(line["curve"], target, grid.greater_is_better)
            found.append(line["steps"] / step if step else None)
    return found


def reached(curve: Sequence[tuple[float, float]], target: float, greater_is_better: bool) -> float | None:
    """Return the step at which a curve first reaches `target`, on straight lines between its evaluations."""
    sign = -1 if greater_is_better else 1
    for (step, value), (next_step, next_value) in pairwise(curve):
        if sign * next_value <= sign * target:
            return step + (next_step - step) * (target - value) / (next_value - value)
    return None


def uniform_table(grid: Grid) -> str:
    """Return the table of plain LoRA at the rate that LoRA+ gives to lora_B, with the first seed."""
    heads = ["ratio", "lr", grid.metric, "plain LoRA at lr", "plain LoRA at lr x ratio", "is that unstable?"]
    rows = []
    for ratio, lr, high in uniform(grid):
        values = [(lr, ratio), (lr, PLAIN), (high, PLAIN)]
        texts = ["-" if rate is None else _first(grid, rate, one) for rate, one in values]
        unstable = None if high is None else is_unstable(grid, Setting(high, PLAIN, grid.seeds[0]))
        rows.append([short(ratio), short(lr), *texts, {True: "yes", False: "no", None: "-"}[unstable]])
    return _table(heads, rows)


def uniform(grid: Grid) -> list[tuple[float, float, float | None]]:
    """Return each ratio with its best rate, and the grid's rate that is nearest to their product."""
    return [(ratio, lr, nearest(grid.rates, lr, ratio)) for ratio, lr in ordered(grid) if ratio != PLAIN]


def _first(grid: Grid, lr: float, ratio: float) -> str:
    values = grid.first(lr, ratio)
    return f"{number(grid, values[0])} ({short(lr)})" if values else "missing"


def is_unstable(grid: Grid, setting: Setting) -> bool | None:
    """Return True if a run gained almost nothing, or its loss was not finite. None if the run is missing.

    Almost nothing is less than a tenth of the largest gain in evaluation loss of any run in the grid.
    """
    if setting not in grid.runs:
        return None
    gains = {one: _gain(line) for one, line in grid.runs.items()}
    return gains[setting] < _UNSTABLE * max(gains.values())


def _gain(line: Line) -> float:
    loss = line["metrics"].get("eval_loss")
    return -math.inf if loss is None else line["metrics_before"]["eval_loss"] - loss


def claims_table(grids: Sequence[Grid]) -> str:
    """Return the table of the documented claims: each with the measurement and a verdict."""
    claims = (
        ("1.5 to 2 times faster than plain LoRA", _faster),
        ("the same memory as plain LoRA", _memory),
        ("a uniform high rate is unstable", _uniform),
    )
    rows = [
        [claim, f"{grid.title} ({len(grid.runs)} of {grid.total} runs)", *(judge(grid) or ("-", "not yet measured"))]
        for claim, judge in claims
        for grid in grids
    ]
    return _table(["claim", "where", "measured", "verdict"], rows).replace("---:", "---")


def _faster(grid: Grid) -> tuple[str, str] | None:
    best = dict(ordered(grid))
    plain_lr = best.pop(PLAIN, None)
    if plain_lr is None or not best:
        return None
    ratio = min(best, key=lambda one: (-len(grid.values(best[one], one)), grid.loss(grid.values(best[one], one))))
    factors = speedups(grid, ratio, best[ratio], plain_lr)
    if not factors:
        return None
    known = [factor for factor in factors if factor is not None]
    is_faster = len(known) == len(factors) and sum(known) / len(known) >= _FASTER
    untuned = _times(speedups(grid, ratio, best[ratio], best[ratio]))
    text = f"best against best, ratio {short(ratio)}: {_times(factors)}; than plain LoRA at the same lr: {untuned}"
    return text, _verdict(is_faster, len(factors))


def _memory(grid: Grid) -> tuple[str, str] | None:
    # Only runs of the same processor and version are compared: memory allocators and the program differ between them.
    plain: dict[tuple[str, str], list[int]] = {}
    for one, line in grid.runs.items():
        if one.ratio == PLAIN:
            plain.setdefault(_machine(line), []).append(line["peak_memory_bytes"])
    shares: dict[float, list[float]] = {}
    for one, line in grid.runs.items():
        if one.ratio != PLAIN and _machine(line) in plain:
            share = line["peak_memory_bytes"] / statistics.median(plain[_machine(line)])
            shares.setdefault(one.ratio, []).append(share)
    if not shares:
        return None
    medians = [statistics.median(each) for each in shares.values()]
    text = f"{min(medians):.2f} to {max(medians):.2f} of plain LoRA's (medians of each ratio)"
    is_same = all(abs(share - 1) <= _SAME_MEMORY for share in medians)
    return text, "confirmed" if is_same else "not confirmed"


def _machine(line: Line) -> tuple[str, str]:
    return line["processor"], line["versions"]["loraplus_hydra"]


def _uniform(grid: Grid) -> tuple[str, str] | None:
    first = grid.seeds[0]
    rates = [high for _, _, high in uniform(grid) if high is not None and Setting(high, PLAIN, first) in grid.runs]
    if not rates:
        return None
    unstable = sum(bool(is_unstable(grid, Setting(high, PLAIN, first))) for high in rates)
    every = [lr for lr in grid.rates if is_unstable(grid, Setting(lr, PLAIN, first))]
    since = f"the lowest unstable rate is {short(min(every))}" if every else "no rate of the grid is"
    text = f"plain LoRA at lr x ratio of the best LoRA+ runs: unstable for {unstable} of {len(rates)} ratios; {since}"
    return text, _verdict(unstable == len(rates), 1)


def _verdict(is_confirmed: bool, seeds: int) -> str:
    return ("confirmed" if is_confirmed else "not confirmed") + (", one seed" if seeds == 1 else "")
