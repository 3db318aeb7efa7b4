"""README and docs are true: tables and outputs are those of the program, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.training.hf_trainer.step_memory import step_memory
from tests.conftest import Finished
from tests.support.page_commands import page_commands

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
ALL_PAGES = {**PAGES, "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}
PROGRAM = "python -m loraplus_hydra"
LARGEST_IMAGE = 150_000  # bytes


def text_of(page: str) -> str:
    return ALL_PAGES[page].read_text(encoding="utf-8")


# A step of a model of 8 billion weights takes long to trace.
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page == "docs/howto/model.md" else ()) for page in PAGES]
)
def test_shown_output_of_inspect_is_what_it_prints(
    page: str, cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.runs import inspection

    monkeypatch.setattr(inspection, "step_memory", step_memory)
    shown = re.findall(rf"```bash\n({PROGRAM} inspect[^`]*?)\n```\s+```text\n(.*?)```", text_of(page), flags=re.DOTALL)
    for command, lines in shown:
        ended = cli(*shlex.split(command.replace("\\\n", " "))[3:])
        assert ended.status == 0, ended.err
        assert lines in ended.out


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


def test_table_lists_every_option_of_every_group() -> None:
    rows = dict(
        re.findall(r"^\| \[`(\w+)`\]\(\S+\) \| (.*?) \|", text_of("docs/reference/config.md"), flags=re.MULTILINE)
    )
    for folder in sorted(
        path for path in config_folder().iterdir() if path.is_dir() and not path.name.startswith("__")
    ):
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        if options:
            assert folder.name in rows, f"the table of docs/reference/config.md lacks the group {folder.name}"
            assert sorted(re.findall(r"`([\w.]+)`", rows[folder.name])) == options, folder.name


def test_figures_of_the_readme_are_those_of_the_pages_of_measurements() -> None:
    measured = text_of("docs/numbers/measured.md") + text_of("docs/numbers/study.md")
    figures = re.findall(
        r"\d\.\d{3,4}\b(?!\d)|\d\d\.\d\d%|step \d+", re.sub(r"arXiv \S+|\(http\S+", "", text_of("README.md"))
    )
    assert len(figures) > 8
    assert [figure for figure in figures if figure not in measured] == []


def test_every_page_is_in_the_index() -> None:
    index = text_of("docs/index.md")
    for page in PAGES:
        name = page.removeprefix("docs/")
        assert page in ("README.md", "docs/index.md") or f"({name})" in index, page


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not link.startswith("https://"):
            path, _, heading = link.partition("#")
            target = ALL_PAGES[page].parent / path if path else ALL_PAGES[page]
            assert target.exists(), link
            assert not heading or heading in anchors(target), link


def test_images_are_small_and_shown() -> None:
    shown = {
        (path.parent / image).resolve()
        for path in PAGES.values()
        for image in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    }
    assert shown == {path.resolve() for path in ROOT.glob("docs/images/*")}
    assert all(image.stat().st_size <= LARGEST_IMAGE for image in shown)


def test_a_script_makes_each_picture() -> None:
    from tools.docs import pictures

    made = pictures.OF_RUNS.keys() | pictures.OF_BENCHMARKS.keys()
    shown = {path.name for path in pictures.IMAGES.iterdir()}
    assert shown <= made
    commands = {shlex.join(command.words) for command in page_commands() if command.is_ours}
    for overrides, _ in filter(None, map(pictures.OF_RUNS.get, shown)):  # the pages show the command
        assert shlex.join(overrides).replace("--multirun", "-m") in commands


@pytest.mark.parametrize("page", ALL_PAGES)
def test_names_of_the_code_exist(page: str) -> None:
    for name in sorted(set(re.findall(r"\bloraplus_hydra(?:\.\w+)+", text_of(page)))):
        module, _, attribute = name.rpartition(".")
        owner = importlib.import_module(module)
        if not hasattr(owner, attribute):
            importlib.import_module(name)


def test_contributing_names_rooms_and_files_that_exist() -> None:
    text = text_of("CONTRIBUTING.md")
    for name in re.findall(r"`([\w./]+(?:/|\.(?:py|yaml|md|toml)))`", text):
        assert (ROOT / name).exists() or (ROOT / "loraplus_hydra" / name).exists(), name
    package = ROOT / "loraplus_hydra"
    folders = [path for path in package.iterdir() if path.is_dir() and not path.is_symlink()]  # conf is a link
    rooms = {path.name for path in folders if path.name != "__pycache__"}
    tree = re.search(r"    loraplus_hydra/\n(.*?)\n    docs/", text, flags=re.DOTALL)
    assert tree is not None
    assert set(re.findall(r"^      (\w+)/ ", tree[1], flags=re.MULTILINE)) == rooms


def test_makefile_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ALL_PAGES:
        for target in re.findall(r"^make ([\w-]+)", text_of(page), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_python_versions_agree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    classifiers = settings["project"]["classifiers"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    oldest, newest = versions[0], versions[-1]
    assert settings["project"]["requires-python"] == f">={oldest},<3.{int(newest.split('.')[1]) + 1}"
    assert settings["tool"]["mypy"]["python_version"] == oldest
    assert settings["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    for page in ("README.md", "docs/start/install.md"):
        assert f"Python {', '.join(versions[:-1])} or {newest}" in " ".join(text_of(page).split()), page
