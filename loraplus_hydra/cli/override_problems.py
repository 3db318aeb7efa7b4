"""Problems for all overrides that Hydra refuses, each with the nearest valid name.

Hydra stops at the first such override. Here each override is added to those that compose, so all errors are found.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from loraplus_hydra.check.values import select, set_elsewhere
from loraplus_hydra.cli.arguments import flags_and_overrides
from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.config.locations import config_folder, options_of
from loraplus_hydra.config.schema import CLOSED_GROUPS, GROUPS, RunConfig, run_of
from loraplus_hydra.config.synonyms import meant_option, meant_overrides
from loraplus_hydra.errors import Problem, first_line, nearest
from loraplus_hydra.sweep.plugins import missing_plugin

RECIPES = ("experiment", "hparams_search", "launcher", "debug")  # groups whose files change the whole config
ROOT_KEYS = (
    *(field.name for field in fields(RunConfig)),
    *("sweep", "halving", "tune", *RECIPES),
)
# `key = value`, `key= value`, `key =value`, `key: value` or `key:value`, of one to three words.
_SPACED = re.compile(r"([\w./@]+)(?: = ?|= | =|: ?)([^\s=]+)(?= |$)")
# Kinds of sweep overrides whose values can be listed without a sweeper.
_LISTED = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def has_unknown_key(arguments: list[str]) -> bool:
    """Return True if the first part of an override's key is certainly unknown.

    The config is not composed. If other configs may add keys (with a `+`, or with flags such as --config-dir), the
    result is False.
    """
    if any(argument.startswith(("--config", "-c", "--shell", "-sc", "hydra.searchpath")) for argument in arguments):
        return False
    words = (re.match(r"(\w+)[.=/@]", text) for text in flags_and_overrides(arguments)[1])
    return any(word is not None and word[1] not in (*ROOT_KEYS, "hydra") for word in words)


def is_composing_error(error: BaseException) -> bool:
    """Return True for an error from the composition of the config."""
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return True
    places = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(places) and places[-1].split(".")[0] in ("hydra", "omegaconf", "antlr4", "yaml")


def override_problems(
    arguments: list[str],
    config: str,
    first_error: Exception | None = None,
    flags: Sequence[tuple[Problem, str, str]] = (),
) -> list[Problem]:
    """Return one Problem for each override in `arguments` that doesn't compose with the YAML `config`.

    `flags` are the Problems of unknown flags, each with its name and value, which may be meant as an override.
    `first_error` is Hydra's own error, if known. With a single override, it is used instead of a second composition.
    """
    given = get_args_parser().parse_known_args(arguments)[0]
    overrides = given.overrides
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):  # which restores Hydra's state
        _search(given.config_path, given.config_dir)
        is_sweep = bool({"--multirun", "-m"} & set(arguments))
        composition = _Composition(config, is_sweep, name=given.config_name or config)
        if (given.config_name or given.config_path) and not composition.composes():
            return [problem for problem, _, _ in flags]  # the other error is in the user's YAML
        known_error = first_error if len(overrides) == 1 else None
        spaced, overrides = _without_spaces(overrides)
        tried = [composition.accept(text, known_error) for text in overrides]
        problems = [_pair_problem(*each, composition) for each in (*flags, *spaced)]
    problems += [problem for problem in tried if problem is not None]
    if not problems and first_error is not None:
        return _swept_group_problems(overrides, first_error)
    return problems


def _search(instead: str | None, also: str | None) -> None:
    """Let Hydra search the folders of --config-path and --config-dir, as for the command itself."""
    path = create_config_search_path(instead or str(config_folder()))
    if also is not None:
        path.prepend("command-line", f"file://{Path(also).absolute()}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("app", path)


@dataclass
class _Composition:
    """The overrides that compose with the YAML `name` so far. `config` is the command's own YAML."""

    config: str
    is_sweep: bool
    name: str
    accepted: list[str] = field(default_factory=list)
    _composed: dict[int, DictConfig] = field(default_factory=dict)  # by the number of accepted overrides

    @property
    def is_run(self) -> bool:
        """True for a run's config, whose keys are known without a composition."""
        return self.config == "config"

    def compose(self, *overrides: str) -> DictConfig:
        if overrides or len(self.accepted) not in self._composed:
            composed = compose(self.name, overrides=[*self.accepted, *overrides], return_hydra_config=True)
            if overrides:
                return composed
            self._composed = {len(self.accepted): composed}
        return self._composed[len(self.accepted)]

    def composes(self) -> bool:
        """Return False if the YAML itself has an error."""
        try:
            self.compose()
        except Exception:  # Hydra doesn't catch errors of the libraries that it calls
            return False
        return True

    def accept(self, text: str, known_error: Exception | None) -> Problem | None:
        """Add an override, or return a Problem if it doesn't compose.

        `known_error` is Hydra's error, if known.
        """
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            return _grammar_problem(text, error, self)
        key = override.key_or_group
        if self.name == "config" and has_unknown_key([text]):
            return _unknown_key(key, text, self)
        if override.is_sweep_override() and not self.is_sweep:
            return _several_values(text, override)
        singles = _single_values(text, override)
        if known_error is not None and len(singles) == 1:
            return _explain(key, text, known_error, self)
        for single in singles:
            try:
                self.compose(single)
            except Exception as error:  # Hydra doesn't catch errors of the libraries that it calls
                return _explain(key, single, error, self)
        self.accepted.append(singles[0])
        return None


def _without_spaces(words: list[str]) -> tuple[list[tuple[Problem, str, str]], list[str]]:
    """Return (Problem, key, value) for overrides such as `seed = 3`, and all other words."""
    spaced: list[tuple[Problem, str, str]] = []
    others: list[str] = []
    left = list(words)
    while left:
        typed = " ".join(left[:3])
        if found := _SPACED.match(typed):
            count = len(found[0].split())
            problem = Problem(found[0], "is not an override", "write key=value, without spaces")
            spaced.append((problem, found[1], found[2]))
            del left[:count]
        else:
            others.append(left.pop(0))
    return spaced, others


def _pair_problem(problem: Problem, key: str, value: str, composition: _Composition) -> Problem:
    """Return the Problem with the override that the key and the value probably mean, if there is one."""
    config = composition.compose()
    if select(OmegaConf.to_container(config, resolve=False), key)[0]:
        fix = f"write {key}={value}"
    else:
        fix = _meant_overrides(key, f"{key}={value}", config) if composition.is_run else ""
    return replace(problem, what=problem.what.partition(" (")[0], fix=fix) if fix else problem


def _swept_group_problems(overrides: list[str], error: Exception) -> list[Problem]:
    """Return Problems for overrides that fail only because the sweep varies their group.

    The jobs' configs have an option of that group, but Hydra's config for the whole sweep has none.
    """
    parsed = [(text, OverridesParser.create().parse_override(text)) for text in overrides]
    groups = tuple(f"{one.key_or_group}." for _, one in parsed if one.is_sweep_override())
    what = "is a key of only some options of the group, and the group is swept"
    return [
        Problem(one.key_or_group, what, f"write ++{text.lstrip('+')}")
        for text, one in parsed
        if one.key_or_group.startswith(groups) and f"'{one.key_or_group}'" in str(error)
    ]


def _several_values(text: str, override: Override) -> Problem:
    if override.value_type not in _LISTED:
        return Problem(text, "is an interval or a pattern, not a value", "use one value")
    fix = "write key=[a,b] for a list, key='\"a,b\"' for a text, or add --multirun for one run per value"
    return Problem(text, "has several values", fix)


def _single_values(text: str, override: Override) -> list[str]:
    """Return an override for each value of a sweep override. Other overrides are returned unchanged."""
    if not override.is_sweep_override() or override.value_type not in _LISTED:
        return [text]
    prefix = text.split("=", 1)[0]
    return [f"{prefix}={value}" for value in override.sweep_string_iterator()]


def _grammar_problem(text: str, error: HydraException, composition: _Composition) -> Problem:
    if "=" in text or text.startswith("~"):
        return Problem(text, f"can't be read: {first_line(error)}", "quote the value: key='\"...\"'")
    if text in COMMANDS:
        fix = f"write {text} ... before all other words"
        return Problem(text, "is a command, but a command must be the first word", fix)
    fix = "write key=value"
    if not composition.is_run:
        fix = f"for example: {composition.config} {COMMANDS[composition.config].usage}"
    elif text.endswith((".yaml", ".yml")):
        fix = "use your own YAML as an option of a group: --config-dir DIR experiment=x for DIR/experiment/x.yaml"
    elif meant := meant_option("data", text):
        fix = f"write {meant}"
    return Problem(text, f"is neither a command nor key=value{nearest(text, (*COMMANDS, '--help'))}", fix)


def _explain(key: str, text: str, error: Exception, composition: _Composition) -> Problem:
    """Return Hydra's error for an override as a Problem."""
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if plugin := missing_plugin(error, key):
        return plugin
    if text.startswith("~"):
        return _not_deleted(key, text, composition)
    if "Multiple values for" in str(error):
        return Problem(text, "chooses a second option of the group", f"remove the plus: {text.lstrip('+')}")
    if f"Key '{key}' not in" in str(error) and key in RECIPES:  # Hydra put the file's keys below the group's name
        fix = "begin it with the line `# @package _global_`"
        return Problem(text, f"the keys of this file are not at the top of the config, but below `{key}`", fix)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _unknown_option(key, text.split("=", 1)[1], list(error.options), composition)
    if "Config group override must be a string" in str(error):  # a number
        options = options_of(key)
        return _unknown_option(key, text.split("=", 1)[1], options, composition)
    if isinstance(cause, ValidationError):
        return _wrong_type(key, text, cause)
    if "is already at" in str(error) or "Could not append" in str(error):
        plain = text.lstrip("+")
        fix = f"remove the plus: {plain} (in a sweep of groups: ++{plain})"
        return Problem(text, "is already in the config", fix)
    if "Could not override" in str(error) or "No match in the defaults list" in str(error):
        return _unknown_key(key, text, composition)
    return Problem(text, " ".join(line.strip() for line in str(error).splitlines()[:2]))


def _not_deleted(key: str, text: str, composition: _Composition) -> Problem:
    """Return the Problem for a `~key` or `~key=value` that deletes nothing."""
    parent, names = _deepest_part(key, composition.compose())
    last = key.rpartition(".")[2]
    if key.removeprefix(f"{parent}.") == last and last in names:
        if "=" not in text:
            return Problem(text, "this key can't be deleted", f"set another value: {key}=...")
        return Problem(text, "deletes nothing, because the config has another value", f"write ~{key}")
    return Problem(text, f"there is no such key to delete{nearest(last, names)}", "leave it out")


def _unknown_option(key: str, value: str, options: list[str], composition: _Composition) -> Problem:
    if composition.is_run and (meant := meant_option(key, value)):
        return Problem(key, f"there is no option '{value}'", f"write {meant}")
    if value.lower() in options:
        return Problem(key, f"there is no option '{value}'", f"write {key}={value.lower()}")
    return Problem(key, f"there is no option '{value}'{nearest(value, options)}", f"use one of {', '.join(options)}")


def _wrong_type(key: str, text: str, cause: ValidationError) -> Problem:
    """Return the Problem for a value whose type is not the key's."""
    message, fix = first_line(cause), "use a value of that type"
    name, _, value = text.partition("=")
    if "is not a ListConfig, list or tuple" in message:
        return Problem(key, f"'{value}' is not a list", f"write {name}=[{value}]")
    match = re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", message)
    if "is not Optional" in message:
        return Problem(key, "can't be null", "give it a value, or leave it out")
    if match is None:
        return Problem(key, message, fix)
    names = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    return Problem(key, f"'{match[1]}' is not {names.get(match[2], match[2])}", fix)


def _unknown_key(key: str, text: str, composition: _Composition) -> Problem:
    """Return the Problem for a key that doesn't exist, with the keys of its longest existing part."""
    is_run, config = composition.is_run, composition.compose()
    if is_run and has_unknown_key([text]):
        hint = nearest(key.replace("/", ".").split(".")[0], ROOT_KEYS)
        if fix := _meant_overrides(key.rpartition(".")[2], text, config):
            return Problem(key, "there is no such key", fix)
        if problem := set_elsewhere(f"trainer.{key}"):
            return replace(problem, key=key, what="there is no such key")
        return Problem(key, f"there is no such key{hint}", f"the config has the keys {', '.join(ROOT_KEYS)}")
    if is_run and (problem := set_elsewhere(key)):
        return problem
    parent, names = _deepest_part(key, config)
    last = key.removeprefix(f"{parent}.").split(".")[0]
    if last in names and is_run:
        holder = f"{parent}.{last}".lstrip(".")
        if holder == key:
            return Problem(key, "the value has a key that is not there yet", f"add it with a plus: +{text}")
        if holder == "tune":
            return Problem(key, "is a key of the command `tune`", f"write the command first: tune {text}")
        return Problem(key, f"{holder} is not a mapping of keys", f"set the whole value: {holder}=...")
    if last in names:  # a stored run's group, whose option can't be changed
        fix = f"change single keys: {key}.key=value"
        return Problem(key, f"'{text}' chooses another option, but a stored run's option can't be changed", fix)
    options = _options_with(key) if is_run and parent in (*GROUPS, "task.args") else []
    if composition.config == "resume" and key in ROOT_KEYS:  # the run's seed, and forgetting
        return Problem(key, "can't be changed by a resume", "leave it out, or start a new run")
    if composition.config == "resume":  # its groups are empty until the run's config is read
        is_run, config = True, compose("config", return_hydra_config=True)
    if is_run and not options and (fix := _meant_overrides(last, text, config)):
        return Problem(key, "there is no such key", fix)
    hint = "" if options else nearest(last, names)
    fix = f"{parent or 'the config'} has the keys {', '.join(names) or '(none)'}"
    if options:
        fix = f"choose an option that has this key: {', '.join(options)}"
    if not hint and (when := _may_be_added(parent, of_an_option=bool(options))):
        fix += f". {when}, write +{text.lstrip('+')}"
    return Problem(key, f"there is no such key{hint}", fix)


def _deepest_part(key: str, config: DictConfig) -> tuple[str, list[str]]:
    """Return the longest part of a dotted key that is a mapping in the config, and the keys in it."""
    parent = key.rpartition(".")[0]
    while parent and not isinstance(_selected(config, parent), DictConfig):
        parent = parent.rpartition(".")[0]
    holder = _selected(config, parent) if parent else config
    return parent, sorted(str(name) for name in holder if name != "hydra")


def _selected(config: DictConfig, key: str) -> Any:
    """Return the value of a dotted key; None if an interpolation on the way to it fails."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None


def _meant_overrides(name: str, text: str, config: DictConfig) -> str:
    """Return advice for a key of another group or another tool; empty if none is known."""
    plain: Any = OmegaConf.to_container(run_of(config), resolve=False)
    meant = meant_overrides(name, text.partition("=")[2], plain)
    return f"write {meant}" if meant else ""


def _may_be_added(parent: str, *, of_an_option: bool) -> str:
    """Return text about adding a missing key to `parent`; empty if that is not allowed."""
    group, _, inside = parent.partition(".")
    if group == "loraplus":
        return "To add it" if inside else ""  # a rule, or a rule's key
    if group in ("data", "task") and of_an_option:
        return ""  # the options already have all keys of their functions
    return "If it is an argument of the group's class" if group in GROUPS and group not in CLOSED_GROUPS else ""


def _options_with(key: str) -> list[str]:
    """Return the options whose YAML has `key`, as overrides such as `data=jsonl`."""
    group, _, inside = key.partition(".")
    files = sorted((config_folder() / group).glob("*.yaml"))
    plain = {file.stem: OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files}
    return [f"{group}={option}" for option, values in plain.items() if select(values, inside)[0]]
