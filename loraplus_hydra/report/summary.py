"""A sweep's conclusions as sentences, for the page and the terminal."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator

from loraplus_hydra.io.result import FAILED, INTERRUPTED, OK, PRUNED, WAITING
from loraplus_hydra.report.compare import CLEAR, NOISE, ONE_SEED, UNCLEAR, Difference, Reach, Tolerance
from loraplus_hydra.report.edges import PROGRAM, command_words, edges, extending_command
from loraplus_hydra.report.formatting import count, measured, short, with_spread
from loraplus_hydra.report.read_job import BROKEN, RUNNING, UNFINISHED
from loraplus_hydra.report.read_sweep import Sweep
from loraplus_hydra.report.results import SweepResults

_OF_A_SEARCH = re.compile(r"\+*(hparams_search=(halving|tune)$|halving=|tune[.=])")  # a single run refuses them
_OF_CONFIGS = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")  # flags of Hydra
_STATES = {
    RUNNING: "running",
    WAITING: "waiting at a rung",
    PRUNED: "left the search",
    INTERRUPTED: "stopped",
    FAILED: "failed",
    UNFINISHED: "unfinished",
    BROKEN: "unreadable",
    OK: "without the metric",
}
_MANY = 6  # from this number of settings on, the lead of the best is partly due to lucky seeds


def overview(sweep: Sweep) -> str:
    """Return the number of jobs in each state: `9 jobs: 5 with a result, 1 running, 3 failed`."""
    numbers = Counter(job.status for job in sweep.jobs if not job.has_result)
    states = [f"{sum(job.has_result for job in sweep.jobs)} with a result"]
    states += [f"{numbers[status]} {word}" for status, word in _STATES.items() if numbers[status]]
    states += [f"{sweep.not_begun} not begun"] if sweep.not_begun else []
    return f"{count(len(sweep.jobs) + sweep.not_begun, 'job')}: {', '.join(states)}"


def headline(results: SweepResults) -> str:
    """Return the best setting and its metric in one sentence."""
    best, metric = results.outcome.best, results.sweep.metric
    if results.sweep.answer:
        return results.sweep.answer[0]
    if best is None:
        return "No job has a result, so there is nothing to compare."
    if len(results.settings) == 1:
        return f"The only setting has {metric} {with_spread(best.mean, best.spread)}."
    seeds = f" over {count(len(best.measured), 'seed')}" if len(best.measured) > 1 else ""
    return f"Best: {results.label(best)}, with {metric} {with_spread(best.mean, best.spread)}{seeds}."


def details(results: SweepResults) -> list[str]:
    """Return sentences about the comparison with ratio 1, noise, and other good settings."""
    outcome = results.outcome
    if results.sweep.answer:
        return [*results.sweep.answer[1:]]
    if outcome.best is None:
        return []
    sentences = [*_against_ratio_1(results)]
    if outcome.passed_over is not None:
        one = outcome.passed_over
        seeds = f"only {len(one.measured)} of {count(len(outcome.best.measured), 'seed')}"
        why = count(one.failed, "failed job") if one.failed else seeds
        sentences.append(
            f"{results.label(one)} has a better mean ({measured(one.mean)}) but {why}, so it isn't chosen as the best."
        )
    if outcome.tolerance is not None:
        number = len(outcome.near)
        near = f"{count(number, 'other setting')} {'is' if number == 1 else 'are'}" if number else "No other setting is"
        plain = ", the best of plain LoRA among them" if outcome.baseline in outcome.near else ""
        sentences.append(f"{near} about as good as the best ({rule_of(outcome.tolerance)}){plain}.")
    if outcome.best.ratio is not None and outcome.best.ratio < 1:
        sentences.append(
            f"The best setting's ratio is {outcome.best.ratio:.2g}: "
            "lora_A trains faster than lora_B, the opposite of LoRA+."
        )
    if len(outcome.ranked) >= _MANY and len(outcome.best.measured) > 1:
        sentences.append(
            f"The best of {len(outcome.ranked)} settings was chosen and measured with the same seeds, so its lead is "
            "overestimated. To be sure, run the two best settings again with new seeds."
        )
    return sentences


def rule_of(tolerance: Tolerance) -> str:
    """Return the rule by which a setting is about as good as the best."""
    what = "the median standard deviation over seeds" if tolerance.by_seeds else "5% of the sweep's range"
    return f"within {tolerance.size:.2g}, {what}"


def verdict(gap: Difference) -> str:
    """Return a sentence about a difference and the noise between seeds."""
    if gap.verdict == ONE_SEED:
        return "With one seed the noise is unknown. To measure it, also sweep seed=1,2,3."
    assert gap.interval is not None
    seeds = f"{count(len(gap.better.measured), 'seed')} against {len(gap.worse.measured)}"
    interval = f"95% interval of the difference: {_signed(gap.interval[0])} to {_signed(gap.interval[1])}, {seeds}"
    won = f"; better at {gap.wins} of {count(gap.shared, 'shared seed')}" if gap.shared else ""
    return {
        NOISE: f"This can be noise, because the difference is at most the spread over seeds ({measured(gap.spread)}).",
        UNCLEAR: "This may be noise: the difference is larger than the spread over seeds, but there are too few seeds "
        f"({interval}{won}).",
        CLEAR: f"This is more than the noise between seeds ({interval}{won}).",
    }[gap.verdict]


def speed_sentence(results: SweepResults) -> str:
    """Return a sentence about the steps to ratio 1's final metric; empty if unknown."""
    outcome = results.outcome
    if outcome.target is None or outcome.best is None or outcome.best is outcome.baseline or results.sweep.answer:
        return ""
    reach = next((one for one in outcome.reached if one.setting is outcome.best), None)
    metric = results.sweep.metric
    if reach is None or reach.step is None or reach.times_fewer_steps is None:
        return f"The best setting's mean curve never reaches ratio 1's final {metric} ({measured(outcome.target)})."
    reaches = f"The best setting reaches ratio 1's final {metric} ({measured(outcome.target)})"
    if reach.times_fewer_steps == 1:  # without the time, because for equal steps the times differ only by noise
        return f"{reaches} no sooner than ratio 1: by step {reach.step:,}. Only steps with an evaluation are compared."
    return (
        f"{reaches} {_times(reach)}: by step "
        f"{reach.step:,} instead of {outcome.reached[0].step:,}. Only steps with an evaluation are compared."
    )


def command(results: SweepResults) -> str:
    """Return the shell command that runs the best job again; empty if unknown."""
    job = results.outcome.best_job
    if job is None or job.rerun is None:
        return ""
    rerun = [text for text in job.rerun if not _OF_A_SEARCH.match(text)]
    # The config of a ready-made sweep sets hydra.mode to MULTIRUN.
    single = ("hydra.mode=RUN",) if any(text.startswith("hparams_search=") for text in rerun) else ()
    return shlex.join((*PROGRAM, *_config_flags(results.sweep.command), *rerun, *single))


def _config_flags(sweep_command: str) -> Iterator[str]:
    """Yield the flags of a sweep's command that name configs, with their values.

    Without them, the overrides would be composed with other configs, or with none.
    """
    words = command_words(sweep_command)
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word in _OF_CONFIGS:
            yield from (word, following)
        elif word.startswith(tuple(f"{flag}=" for flag in _OF_CONFIGS)):
            yield word


def extension(results: SweepResults) -> tuple[list[str], str]:
    """Return a sentence for each key with its best value at the edge, and the extending command.

    The command is empty if there is no such key or the sweep's own command is unknown.
    """
    if results.sweep.answer:
        return [], results.sweep.extend
    found = edges(results)
    sentences = [
        f"At the grid's edge: {edge.key} {short(edge.best)} is the {'largest' if edge.upper else 'smallest'} value. "
        f"Extend to {edge.next_text}."
        for edge in found
    ]
    return sentences, extending_command(results, found)


def _against_ratio_1(results: SweepResults) -> Iterator[str]:
    outcome = results.outcome
    if outcome.baseline is None:
        if any(one.ratio == 1 for one in results.settings):
            has_result = any(one.ratio == 1 for one in outcome.ranked)
            found = f"No setting at ratio 1 has a result{' for each of its seeds' if has_result else ''}"
            yield _plain_left(results) or f"{found}, so there is nothing to compare LoRA+ with."
        elif outcome.contender is not None:
            yield "The sweep has no ratio 1 (plain LoRA) to compare with: add 1 to the swept ratios."
    elif outcome.against_baseline is not None:
        yield _gain(results, outcome.against_baseline)
        yield verdict(outcome.against_baseline)
        if outcome.against_twin:
            yield _twin(results, outcome.against_twin)


def _plain_left(results: SweepResults) -> str:
    """Return a sentence about the last setting at ratio 1 that left a search; empty if none did."""
    best, by_loss = results.outcome.best, results.sweep.rungs_by_loss
    left = [one for one in results.settings if one.ratio == 1 and one.left_at is not None]
    if not left or best is None:
        return ""
    step = max(one.left_at or 0 for one in left)
    here = [(one.at_rung(step, by_loss=by_loss), one) for one in left if one.left_at == step]
    sign = -1 if results.sweep.greater_is_better and not by_loss else 1
    own, last = min(here, key=lambda pair: math.inf if pair[0] is None else sign * pair[0])
    others = best.at_rung(step, by_loss=by_loss)
    text = (
        "No setting at ratio 1 (plain LoRA) was trained to its end. The last of them to leave the search was "
        f"{results.label(last)}, at step {step:,}."
    )
    if own is None or others is None:
        return text
    what = "loss" if by_loss else results.sweep.metric
    return f"{text} Its {what} there was {measured(own)}; that of the best setting was {measured(others)}."


def _gain(results: SweepResults, gap: Difference) -> str:
    """Return a sentence about the better one of LoRA+ and plain LoRA."""
    worse, label = with_spread(gap.worse.mean, gap.worse.spread), results.label(gap.worse)
    gain = measured(gap.gain) + (f" ({abs(gap.relative):.2%})" if gap.relative is not None else "")
    if gap.better is results.outcome.baseline:
        best = results.label(gap.better)
        return f"Plain LoRA is the best here: {best} is better than the best other ratio, {label} ({worse}), by {gain}."
    which = "" if label == "ratio 1" else f", {label}"
    return f"This is better than the best at ratio 1 (plain LoRA){which} ({worse}), by {gain}."


def _twin(results: SweepResults, gap: Difference) -> str:
    """Return a sentence about the best LoRA+ setting and the same setting at ratio 1."""
    twin = with_spread(gap.worse.mean, gap.worse.spread)
    change = f"{measured(abs(gap.gain))} {'worse' if gap.gain > 0 else 'better'}"
    noise = "" if gap.verdict == ONE_SEED else f" {verdict(gap)}"
    return f"With lora_B's rate set to lora_A's, {results.label(gap.better)} has {twin}: {change}.{noise}"


def _times(reach: Reach) -> str:
    """Return the speed-up in steps and in time."""
    assert reach.times_fewer_steps is not None
    steps = f"in {_factor(reach.times_fewer_steps, 'fewer steps', 'more steps', 'about as many steps')}"
    if not reach.times_faster:
        return steps
    return f"{steps} ({_factor(reach.times_faster, 'faster', 'slower', 'as fast')} in time)"


def _factor(times: float, above: str, below: str, equal: str) -> str:
    text = f"{max(times, 1 / times):.2g}"
    return equal if text == "1" else f"{text}x {above if times > 1 else below}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 1e3 else f"{value:+.3g}"
