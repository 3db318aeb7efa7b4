"""Checks of the `hydra` node for errors that Hydra finds only after it has made a folder."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line, nearest, refuse
from loraplus_hydra.io import run_folder

_LOGGINGS = ("hydra_logging", "job_logging")


def refuse_wrong_settings(hydra: DictConfig) -> None:
    """Raise ConfigErrors for values of `hydra` that would cause errors later."""
    refuse(_problems(hydra))


def explain_logging_error(error: Exception) -> Exception:
    """Return ConfigErrors if `error` is from Hydra's setup of logging, otherwise `error`."""
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if "configure_log" not in names or isinstance(error, UserError):
        return error
    what = f"Hydra can't set up its log: {first_line(error)}"
    return ConfigErrors([Problem("hydra.verbose, hydra.hydra_logging", what, "remove these overrides")])


def _problems(hydra: DictConfig) -> Iterator[Problem]:
    # Unresolved, because the interpolations need the run's folder, which Hydra hasn't made yet.
    plain: Any = OmegaConf.to_container(hydra, resolve=False)
    name, folder, verbose = plain["job"]["name"], plain["output_subdir"], plain["verbose"]
    if "/" in str(name) or "\0" in str(name):
        yield Problem("hydra.job.name", f"'{name}' is the log file's name, so it can't contain a '/'", "leave it out")
    # conf/resume.yaml has a folder inside .hydra.
    is_given = folder is not None and not str(folder).startswith(("${", f"{run_folder.HYDRA}/resumed-"))
    if is_given and (folder in (*run_folder.WRITTEN, f"{name}.log") or "/" in str(folder)):
        fix = f"remove it: the folder is {run_folder.HYDRA}"
        yield Problem("hydra.output_subdir", f"'{folder}' is the name of another file or folder of a run", fix)
    if not isinstance(verbose, (bool, str, list)):
        yield Problem("hydra.verbose", "must be true, false, or one or several loggers' names", "hydra.verbose=true")
    for key in _LOGGINGS:
        yield from _logging_problems(f"hydra.{key}", plain[key])


def _logging_problems(key: str, found: Any) -> Iterator[Problem]:
    fix = "remove it, or set single levels: hydra.job_logging.root.level=WARNING"
    if not isinstance(found, dict) or not isinstance(found.get("root"), dict) or not found.get("handlers"):
        yield Problem(key, "has no handlers, so nothing would be logged", fix)
        return
    try:
        yield from _wrong_names(key, found, fix)
    except (AttributeError, TypeError):
        yield Problem(key, "is not a valid config of Python's logging", fix)


def _wrong_names(key: str, config: Mapping[Any, Any], fix: str) -> Iterator[Problem]:
    handlers, formatters = config["handlers"], config.get("formatters") or {}
    for name, handler in handlers.items():
        formatter = handler.get("formatter")
        if "class" not in handler and "()" not in handler:
            yield Problem(f"{key}.handlers.{name}", "has no class", fix)
        if formatter is not None and formatter not in formatters:
            yield Problem(f"{key}.handlers.{name}", f"there is no formatter '{formatter}'", fix)
    loggers = {f"loggers.{name}": logger for name, logger in (config.get("loggers") or {}).items()}
    for place, logger in {"root": config["root"], **loggers}.items():
        for name in logger.get("handlers") or []:
            if name not in handlers:
                yield Problem(f"{key}.{place}", f"there is no handler '{name}'{nearest(name, handlers)}", fix)
        level = logger.get("level")
        if isinstance(level, str) and level not in logging.getLevelNamesMapping():
            what = f"there is no level '{level}'{nearest(level, logging.getLevelNamesMapping())}"
            yield Problem(f"{key}.{place}.level", what, fix)
