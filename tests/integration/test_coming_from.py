"""Tables of docs/coming-from: each override composes, and is the one that the program names for another tool's key."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from loraplus_hydra.config.synonyms import meant_overrides

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "coming-from").glob("*.md"))
TYPED = re.compile(r"(\w+)(?:: |=)(.+)")
ROWS = ["data=jsonl", "data.train=rows.jsonl"]


def table_rows(page: Path) -> list[tuple[str, str]]:
    """First and second cell of each row of the page's tables."""
    lines = re.findall(r"^\| (.*?) \| (.*) \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(theirs, ours) for theirs, ours in lines if "`" in theirs and "`" in ours]


def overrides(cell: str) -> list[list[str]]:
    """Each code span of a cell that consists of overrides only, as words."""
    spans = [shlex.split(span) for span in re.findall(r"`([^`]+)`", cell)]
    return [words for words in spans if words and all(re.match(r"\+?[\w.]+=", word) for word in words)]


@pytest.fixture(scope="module")
def composed() -> Iterator[Callable[..., dict[str, Any]]]:
    """Compose the default config with overrides, as a plain dict."""
    with initialize_config_module("loraplus_hydra.conf", version_base="1.3"):
        yield lambda *words: OmegaConf.to_container(compose("config", overrides=list(words)), resolve=False)


def test_tables_agree_with_what_the_program_says(composed: Callable[..., dict[str, Any]]) -> None:
    config = composed(*ROWS)
    compared, differ = 0, {}
    for page in PAGES:
        for theirs, ours in table_rows(page):
            typed = TYPED.fullmatch(theirs.strip("`"))
            said = typed and meant_overrides(typed[1], typed[2].replace('"', ""), config)
            if not said or "OPTION" in said:
                continue
            compared += 1
            written = [" ".join(words) for words in overrides(ours)]
            if not set(said.replace("=True", "=true").split(" or ")) & set(written):
                differ[f"{page.name}: {theirs}"] = (said, written)
    assert differ == {}
    assert compared > 60


def test_overrides_of_the_tables_compose(composed: Callable[..., dict[str, Any]]) -> None:
    together: dict[str, str] = {}
    alone: set[tuple[str, ...]] = set()
    for _, ours in (row for page in PAGES for row in table_rows(page)):
        cell, _, beside = ours.partition(" (with ")
        base = [word for words in overrides(beside) for word in words]
        for words in ([*base, *words] for words in overrides(cell)):
            if any("." not in word or word.startswith(("data.", "logger.", "experiment")) for word in words):
                alone.add(tuple(words))
            else:
                together[words[0].partition("=")[0]] = words[0]
    for words in [*alone, tuple(together.values())]:
        chosen = {word.partition("=")[0] for word in words}
        composed(*(word for word in ROWS if not chosen & {"data", word.partition("=")[0]}), *words)
