"""Benchmarks of lm-evaluation-harness, with a finished run's adapter in place.

https://github.com/EleutherAI/lm-evaluation-harness (package lm-eval, the extra `harness`)
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from loraplus_hydra.config.locations import expanded
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, nearest, refuse
from loraplus_hydra.io import interrupts, processes
from loraplus_hydra.io.files import found_at
from loraplus_hydra.io.result import finite
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.load_finished import load_run, load_run_tokenizer
from loraplus_hydra.runs.predict import on_device

KEY, FOLDER = "harness", "harness_tasks"
# The parts of the harness's results that are kept; the others repeat these, or describe this machine
_KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples", "higher_is_better")


@dataclass(frozen=True)
class Settings:
    """The tasks to evaluate, and how."""

    tasks: Sequence[str]  # names of tasks, groups or tags
    folder: str | None = None  # with the YAML files of more tasks
    limit: int | None = None  # rows of each task
    batch_size: int = 8
    chat: bool = False  # True applies the run's chat template


def evaluate_tasks(run: FinishedRun, settings: Settings) -> dict[str, Any]:
    """Return the harness's results for the run's adapter, as plain JSON values. Raises UserError."""
    refuse(_problems(run, settings))
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, tasks = _load_tasks(settings)
    interrupts.stop_if_asked()
    model, tokenizer = load_run(run)
    model = on_device(model, run)
    model.tie_weights = lambda *_, **__: None  # the harness would tie a trained head to the embedding again
    stop = model.get_input_embeddings().register_forward_pre_hook(lambda *_: interrupts.stop_if_asked())
    try:
        found = evaluator.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
            tasks=tasks,
            task_manager=manager,
            limit=settings.limit,
            log_samples=False,
            apply_chat_template=settings.chat,
        )
    except Exception as error:  # the tasks' own code raises any type
        raise _error(f"the evaluation failed: {first_line(error)}", "use other tasks") from error
    finally:
        stop.remove()
    return {
        "run": str(run.folder.absolute()),  # the run's folder
        "step": run.step,  # the step of the adapter
        "lm_eval": version("lm_eval"),  # the version of lm-evaluation-harness
        "limit": settings.limit,  # the first rows of each task; null = all
        "batch_size": settings.batch_size,  # rows computed together
        "chat_template": settings.chat,  # true = the prompts are turns in the run's chat template
        **{name: finite(_plain(found[name])) for name in _KEPT if name in found},
    }


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each metric: task, metric, filter, value, standard error, shots and number of rows."""
    rows: list[tuple[str, ...]] = []
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, filter = name.partition(",")
            if not filter or metric.endswith("_stderr"):  # not a metric
                continue
            error = values.get(f"{metric}_stderr,{filter}")
            shots = results["n-shot"].get(task, "")
            count = results["n-samples"].get(task, {}).get("effective", "")
            rows.append((task, metric, filter, _number(value), _number(error), str(shots), str(count)))
    return rows


def _problems(run: FinishedRun, settings: Settings) -> list[Problem]:
    problems = []
    if importlib.util.find_spec("lm_eval") is None:
        fix = "install it: pip install 'loraplus_hydra[harness]'"
        problems.append(Problem(KEY, "this needs the package lm-eval, which isn't installed", fix))
    if str(run.config.task.task_type) != "CAUSAL_LM":
        problems.append(Problem(KEY, "the run's model doesn't predict text", "use evaluate without it"))
    elif settings.chat and not load_run_tokenizer(run).chat_template:
        problems.append(Problem("harness_chat", "the run's tokenizer has no chat template", "set it to false"))
    if processes.world_size() > 1:
        problems.append(Problem(KEY, "this runs in one process", "start it without torchrun"))
    return problems + _folder_problems(run, settings.folder)


def _folder_problems(run: FinishedRun, folder: str | None) -> list[Problem]:
    if folder is None:
        return []
    place = expanded(folder)
    if found_at(place, FOLDER) is None or not place.is_dir():
        return [Problem(FOLDER, f"there is no folder {place}", "name a folder with the YAML files of tasks")]
    if place.resolve().is_relative_to(run.folder.resolve()):
        what = f"{place} is in the run's folder, and tasks are code, which is never read from a run"
        return [Problem(FOLDER, what, "read the tasks, then copy them to another folder")]
    return []


def _load_tasks(settings: Settings) -> tuple[Any, list[Any]]:
    """Return the harness's manager of tasks, and the loaded tasks and groups. Raises ConfigErrors."""
    names = list(dict.fromkeys(settings.tasks))
    manager = _manager(settings.folder, names)
    fix = f"use a name of lm-evaluation-harness, or set {FOLDER} to a folder with its YAML file"
    known = manager.all_tasks
    # Only names: the harness would also read a path as a task.
    refuse(Problem(KEY, f"there is no task '{name}'{nearest(name, known)}", fix) for name in names if name not in known)
    loaded: list[Any] = []
    problems: list[Problem] = []
    for name in names:
        interrupts.stop_if_asked()
        try:
            found = manager.load([name])
        except Exception as error:  # rows, YAML and the tasks' own code raise any type
            what = f"the task '{name}' can't be loaded: {type(error).__name__}: {first_line(error)}"
            fix = "a task's rows come from a hub the first time: load them once with network, or use a local task"
            problems.append(Problem(KEY, what, fix))
            continue
        groups = found.get("groups", {})
        loaded += [groups[name]] if name in groups else found["tasks"].values()
    refuse(problems)
    try:
        manager.load(loaded)
    except ValueError as error:  # a task is also in a group
        raise _error(first_line(error), "name it once") from None
    return manager, loaded


def _manager(folder: str | None, names: Sequence[str]) -> Any:
    """Return a manager that knows the folder's tasks.

    It knows the harness's own tasks only if `names` aren't all in the folder. Raises ConfigErrors.
    """
    from lm_eval.tasks import TaskManager

    place = None if folder is None else str(expanded(folder))
    try:
        if place is not None:
            own = TaskManager(include_path=place, include_defaults=False)
            if {*names} <= {*own.all_subtasks}:
                return own
        return TaskManager(include_path=place)  # reads some fifteen thousand YAML files
    except Exception as error:  # broken YAML
        what = f"the tasks can't be read: {first_line(error)}"
        raise ConfigErrors([Problem(KEY if folder is None else FOLDER, what, "correct the YAML files")]) from error


def _plain(value: Any) -> Any:
    """Return a value of JSON. What JSON doesn't have, such as a function, becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else str(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def _error(what: str, fix: str) -> ConfigErrors:
    return ConfigErrors([Problem(KEY, what, fix)])
