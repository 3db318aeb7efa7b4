"""What a job was asked for: the overrides that it began with, and what its resumes changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraplus_hydra.config.schema import RUN_GROUPS
from loraplus_hydra.io.read import parse_yaml

GOES_ON_FROM = "trainer.resume_from_checkpoint"  # no setting of a run, which is the same with it


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """Key -> value of a job's overrides, as far as they set something: `+key=1e-4` gives key: 0.0001."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, found, value = text.lstrip("+").partition("=")
        if not found or key.startswith("~"):
            continue
        try:
            parsed = parse_yaml(value)
        except (ValueError, RecursionError):
            parsed = value
        values[key] = value if isinstance(parsed, (dict, list)) else parsed
    return values


def overrides_again(
    begun_with: Iterable[str], resumes: Sequence[str], begun: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """The overrides with which a new run has the job's config; None where that can't be said.

    `begun_with` are those of its first start, `resumes` those of all its resumes in order; `begun` is the config of the
    one, `config` what the last left (dotted key -> leaf). The configs tell what is in force: a resume may have been
    refused, and the next one starts from the first start's config again.
    """
    changes: dict[str, str] = {}
    for key in dict.fromkeys(map(_key, resumes)):
        if key.split(".")[0] not in RUN_GROUPS or key == GOES_ON_FROM:  # of the resume itself
            continue
        if key in config and config[key] == begun.get(key):
            continue
        said = [text for text in resumes if _key(text) == key and override_values([text])[key] == config.get(key)]
        if not said:
            return None
        changes[key] = f"++{said[-1].lstrip('+')}"  # the YAML may not list the key
    return (*(text for text in begun_with if _key(text) not in changes), *changes.values())


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
