"""README and docs are true: commands compose, tables and outputs are those of the program, links lead somewhere."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.io.result import OK, Result
from loraplus_hydra.training.hf_trainer.step_memory import step_memory
from tests.conftest import Finished
from tests.support.finished_sweeps import write_job, write_sweep

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
ALL_PAGES = {**PAGES, "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}
PROGRAM = "python -m loraplus_hydra"
LARGEST_IMAGE = 150_000  # bytes


def text_of(page: str) -> str:
    return ALL_PAGES[page].read_text(encoding="utf-8")


def commands() -> list[str]:
    """Return each `python -m loraplus_hydra ...` of the pages' shell blocks, without comment and line breaks."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", text_of(page), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found |= {line.partition(" # ")[0].strip(): None for line in lines if line.startswith(PROGRAM)}
    return list(found)


def trains_or_checks(command: str) -> bool:
    """Return True if the command composes a run's config, rather than opening a finished run or a sweep."""
    words = shlex.split(command)[3:]
    return not words or words[0] not in COMMANDS or COMMANDS[words[0]].config == "config"


@pytest.mark.parametrize("command", [command for command in commands() if trains_or_checks(command)])
def test_command_composes(command: str, cli: Callable[..., Finished]) -> None:
    words = [word for word in shlex.split(command)[3:] if word not in ("-m", "--help", "--cfg", "job")]
    words = [re.sub(r"=([^{\[(]*?),.*", r"=\1", word) for word in words]  # a sweep's first value
    finished = cli(*words, "--cfg", "job")
    if "an option of a Hydra plugin that isn't installed" in finished.err:
        pytest.skip("it needs an extra")
    assert finished.status == 0, finished.err


def heads() -> list[str]:
    """Return the `python -m loraplus_hydra ...` of the YAML files' comments."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(config_folder().rglob("*.yaml")))
    found = (re.findall(rf"^# +({PROGRAM}[^#\n]*?)(?:  .*)?$", text, flags=re.MULTILINE) for text in texts)
    return [command.strip() for each in found for command in each]


@pytest.mark.slow
def test_no_command_draws_a_warning_on_its_rates(cli: Callable[..., Finished]) -> None:
    inspected = 0
    for command in filter(trains_or_checks, dict.fromkeys([*commands(), *heads()])):
        words = [word for word in shlex.split(command)[3:] if "=" in word]
        words = [re.sub(r"=([^{\[(]*?),.*", r"=\1", word) for word in words if not word.startswith("hparams_search")]
        ended = cli("inspect", "--json", *words)
        if ended.status == 0:  # otherwise it names a model or a plugin that isn't here
            inspected += 1
            assert json.loads(ended.out)["advice"] == [], command
    assert inspected > 40


def test_commands_on_finished_runs_and_sweeps_work(
    cli: Callable[..., Finished], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ["model=hub", f"model.path={tiny_model}", "data.max_samples=8", "trainer.max_steps=2", "task.samples=0"]
    ended = cli(*tiny, "hydra.run.dir=RUN")  # on the default's rows
    assert ended.status == 0, ended.err
    Path("other.jsonl").write_text('{"prompt": "def one(): return 1", "completion": "Return one."}\n')
    write_sweep(Path("outputs/sweeps/NAME"))
    write_job(Path("outputs/sweeps/NAME/ratio-4"), {"loraplus.ratio": 4}, 3.5)
    # A command that resumes is checked in full, but nothing is trained.
    monkeypatch.setattr("loraplus_hydra.runs.job.run", lambda *_, **__: Result(OK, "eval_loss"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # a chat without a message
    failed = {}
    for command in [command for command in commands() if not trains_or_checks(command)]:
        ended = cli(*(re.sub(r"^outputs/2026.*", "RUN", word) for word in shlex.split(command)[3:]))
        if ended.status:
            failed[command] = ended.err
    assert not failed


@pytest.mark.parametrize("page", PAGES)
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


def test_readme_is_short_and_has_commands() -> None:
    assert len(text_of("README.md").splitlines()) <= 150
    assert len(commands()) >= 20


def test_table_lists_every_option_of_every_group() -> None:
    rows = dict(re.findall(r"^\| `([\w/]+)` \| (.*?) \|", text_of("docs/reference/config.md"), flags=re.MULTILINE))
    for folder in sorted(
        path for path in config_folder().iterdir() if path.is_dir() and not path.name.startswith("__")
    ):
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        if options:
            assert folder.name in rows, f"the table of docs/reference/config.md lacks the group {folder.name}"
            assert sorted(re.findall(r"`([\w.]+)`", rows[folder.name])) == options, folder.name


def test_figures_of_the_readme_are_those_of_the_page_of_measurements() -> None:
    measured = text_of("docs/numbers/measured.md")
    results, sweeps = (
        re.search(rf"## {heading}\n(.*?)\n## ", text_of("README.md"), flags=re.DOTALL)
        for heading in (r"What LoRA\+ gives you", "Sweeps")
    )
    assert results is not None
    assert sweeps is not None
    for figure in re.findall(r"\d\.\d{3,4}|\d\d\.\d\d%|step \d+", results[1] + sweeps[1]):
        assert figure in measured, figure


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
