"""The documentation site builds without a warning, needs no network, links to what exists, and has every key."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.io.run_folder import METRICS, PARAM_GROUPS, RESULT
from tests.conftest import Finished

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = sorted(path.relative_to(config_folder()).as_posix() for path in config_folder().rglob("*.yaml"))
TOP = ("run", "config", "app")  # these are on one page; each other file at the top is a command's
LINKS = {"a": "href", "link": "href", "img": "src", "script": "src"}


class Page(HTMLParser):
    """A built page: its links, its ids, and the text after each id."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []  # (tag, address)
        self.id = ""
        self.parts: dict[str, list[str]] = {"": []}
        self.feed(path.read_text(encoding="utf-8"))
        self.texts = {
            identity: "".join(parts) for identity, parts in self.parts.items()
        }  # id -> text up to the next id

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        # The lines of code blocks have ids of their own, which no link uses.
        if (identity := found.get("id")) and not identity.startswith("__span"):
            self.id = identity
            self.parts.setdefault(identity, [])
        if (address := found.get(LINKS.get(tag, ""))) and found.get("rel") != "canonical":
            self.links.append((tag, address))

    def handle_data(self, data: str) -> None:
        self.parts[self.id].append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once."""
    folder = tmp_path_factory.mktemp("site")
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        # `strict` ends the build with an exception, also for a warning.
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_of_docs_is_built(pages: dict[str, Page]) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert written <= pages.keys()


def test_links_lead_to_files_and_ids_that_exist(site: Path, pages: dict[str, Page]) -> None:
    broken = []
    for name, page in pages.items():
        for _, address in page.links:
            parts = urlsplit(address)
            if parts.scheme or address.startswith("//"):
                continue
            # The page of an address that doesn't exist (404.html) names the others from the top of a server.
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            target = site / unquote(parts.path).lstrip("/") if parts.path.startswith("/") else target
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{name}: {address}")
            elif parts.fragment and target.suffix == ".html":
                ids = pages[target.resolve().relative_to(site.resolve()).as_posix()].texts
                if unquote(parts.fragment) not in ids:
                    broken.append(f"{name}: {address}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    loaded = {address for page in pages.values() for tag, address in page.links if tag != "a"}
    assert {address for address in loaded if urlsplit(address).netloc} == set()
    assert all("@import" not in path.read_text(encoding="utf-8") for path in site.rglob("*.css"))


def keys_in(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of each key of a YAML file, and of the keys inside."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{key}"
        yield from keys_in(inner, f"{prefix}{key}.")


def place_of(option: str) -> tuple[str, str]:
    """Return the page of an option, and the beginning of its ids there."""
    group, _, name = option.removesuffix(".yaml").rpartition("/")
    page = f"groups/{group}" if group else "keys" if name in TOP else "command-line"
    return f"reference/{page}.html", name


@pytest.mark.parametrize("option", OPTIONS)
def test_the_reference_has_every_key(option: str, pages: dict[str, Page]) -> None:
    page, name = place_of(option)
    texts = pages[page].texts
    content = yaml.safe_load((config_folder() / option).read_text(encoding="utf-8"))
    keys = [key for key in keys_in(content) if not key.startswith("defaults")]
    missing = []
    for key in keys:
        has_parts = any(one.startswith(f"{name}.{key}.") for one in texts)
        parts = key.split(".")
        # A key without a comment of its own is in the text of the key around it.
        around = next((n for n in range(len(parts), 0, -1) if f"{name}.{'.'.join(parts[:n])}" in texts), 0)
        shown = texts[f"{name}.{'.'.join(parts[:around])}"] if around else ""
        if not has_parts and not (around and all(f"{part}:" in shown for part in parts[around:])):
            missing.append(key)
    assert keys
    assert missing == []


def test_the_reference_has_every_command_and_flag(pages: dict[str, Page]) -> None:
    texts = pages["reference/command-line.html"].texts
    for command in COMMANDS.values():
        assert command.name in texts
        for flag in command.flags:
            assert f"--{flag}" in texts[command.name], (command.name, flag)


def test_the_reference_has_every_key_of_a_runs_files(
    pages: dict[str, Page], cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli(*tiny_run, "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    folder = Path("run")
    shown = {
        name: pages["reference/files.html"].texts[name.replace(".", "")] for name in (RESULT, PARAM_GROUPS, METRICS)
    }
    entries = {
        RESULT: [json.loads((folder / RESULT).read_text())],
        PARAM_GROUPS: json.loads((folder / PARAM_GROUPS).read_text()),
        METRICS: [json.loads(line) for line in (folder / METRICS).read_text().splitlines()],
    }
    for name, found in entries.items():
        keys = {key for entry in found for key in entry}
        # Each evaluation has its task's metrics; the page says so.
        missing = keys - set(re.findall(r"\w+", shown[name]))
        assert sorted(key for key in missing if not key.startswith("eval_")) == [], name


@pytest.mark.parametrize("words", [["predict", "RUN"], ["resume"], ["halving=true"], ["--resolve"]], ids=" ".join)
def test_errors_have_their_remedy(words: list[str], pages: dict[str, Page], cli: Callable[..., Finished]) -> None:
    """An error that is printed is on the page of errors, with its remedy."""
    ended = cli(*words)
    assert ended.status == 1
    text = " ".join("".join(pages["reference/errors.html"].texts.values()).split())
    errors = [line.strip().removeprefix("- ") for line in ended.err.splitlines() if line.startswith("  - ")]
    assert errors
    for error in errors:
        what, _, fix = error.partition(": ")[2].partition("; ")
        assert what in text, error
        assert fix in text, error


def test_the_errors_have_every_plain_text_of_the_sources(pages: dict[str, Page]) -> None:
    text = " ".join("".join(pages["reference/errors.html"].texts.values()).split())
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "loraplus_hydra").rglob("*.py")]
    plain = {what for source in sources for what in re.findall(r'Problem\(\s*f?"[^"]*",\s*"([^"]+)"', source)}
    assert len(plain) > 30
    assert {what for what in plain if what.replace("`", "") not in text} == set()
