"""Commands of the pages compose, have right values, and run; those that need a GPU or a network say so."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from loraplus_hydra.check import stored_problems
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import run_of
from loraplus_hydra.io.result import OK, Result
from tests.conftest import Finished
from tests.support.finished_sweeps import write_job, write_sweep
from tests.support.page_commands import PAGES, PROGRAM, ROOT, PageCommand, page_commands

COMMANDS = page_commands()
OF_RUNS = [command for command in COMMANDS if command.is_ours and command.trains_or_checks]
WRONG_ON_PURPOSE = ("optimizer.lr=0 adapter.r=0",)  # an example of errors
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Rows for the commands that name a file: every column that the pages' commands set.
FILES = {
    "train.jsonl": {"question": "What is {n} + 1?", "answer": "It is {n} and one."},
    "other.jsonl": {"prompt": "def f{n}(): return {n}", "completion": "Return {n}."},
    "pairs.jsonl": {"prompt": "say {n}", "chosen": "{n}", "rejected": "no"},
    "judged.jsonl": {"prompt": "say {n}", "completion": "{n}", "label": "{odd}"},
    "mails.csv": {"mail": "Where is number {n}?", "topic": "{odd}"},
}
SHORT = {
    "trainer.max_steps": "2",
    "trainer.per_device_train_batch_size": "2",
    "trainer.eval_strategy": "no",
    "data.max_samples": "16",
    "task.samples": "0",
}
NO_EXTRA = ("an option of a Hydra plugin that isn't installed", "isn't installed", "it needs the package")


def by_line(command: PageCommand) -> str:
    return command.line.removeprefix(PROGRAM).strip()


def first_values(words: list[str]) -> list[str]:
    """Return the words with the first value of each sweep, without the flags of Hydra."""
    words = [word for word in words if word not in ("-m", "--multirun", "--help", "--cfg", "job")]
    return [re.sub(r"=([^{\[(]*?),.*", r"=\1", word) for word in words]


@pytest.mark.parametrize("command", OF_RUNS, ids=by_line)
def test_command_composes_and_its_values_are_right(command: PageCommand, cli: Callable[..., Finished]) -> None:
    finished = cli(*first_values(command.words), "--cfg", "job")
    if NO_EXTRA[0] in finished.err:
        pytest.skip("it needs an extra")
    assert finished.status == 0, finished.err
    if not any(words in command.line for words in WRONG_ON_PURPOSE):
        run = run_of(OmegaConf.create(finished.out))
        found = [str(one) for one in stored_problems(run) if not one.key.startswith(("data", "model"))]
        # Rows and weights aren't there, and packages of extras may be missing.
        assert [text for text in found if not any(words in text for words in NO_EXTRA)] == []


@pytest.mark.parametrize("command", OF_RUNS, ids=by_line)
def test_command_that_loads_from_a_hub_says_so(command: PageCommand) -> None:
    names = [word for word in command.words if word.startswith(("model.path=", "data.name="))]
    assert command.marked or not any(HUB_NAME.fullmatch(word.partition("=")[2]) for word in names), command.page


def test_no_command_is_outside_a_block_of_commands() -> None:
    hidden = {}
    for page, path in PAGES.items():
        text = re.sub(r"```(bash|text)\n.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        if lines := re.findall(rf"^\s*(?:> )?({re.escape(PROGRAM)}\b.*)$", text, flags=re.MULTILINE):
            hidden[page] = lines
    assert hidden == {}


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.is_ours], ids=by_line)
def test_command_of_another_program_names_what_exists(command: PageCommand) -> None:
    words = [*itertools.dropwhile(re.compile(r"[A-Z_]+=").match, shlex.split(command.line))]
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"(?:\.|loraplus_hydra)\[([\w,]+)\]", command.line):
            assert set(extra.split(",")) <= settings["optional-dependencies"].keys()
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "eval":
        assert f"$({next(iter(settings['scripts']))} " in command.line
    else:
        assert words[0] in ("cd", "git", "python", "source", "tensorboard", "mlflow", "wandb") or command.marked, (
            command.page
        )


def test_commands_on_finished_runs_and_sweeps_work(
    cli: Callable[..., Finished], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ["model=hub", f"model.path={tiny_model}", "data.max_samples=8", "trainer.max_steps=2", "task.samples=0"]
    ended = cli(*tiny, "hydra.run.dir=RUN")  # on the default's rows
    assert ended.status == 0, ended.err
    write_files()
    write_sweep(Path("outputs/sweeps/NAME"))
    write_job(Path("outputs/sweeps/NAME/ratio-4"), {"loraplus.ratio": 4}, 3.5)
    # A command that resumes is checked in full, but nothing is trained.
    monkeypatch.setattr("loraplus_hydra.runs.job.run", lambda *_, **__: Result(OK, "eval_loss"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # a chat without a message
    failed = {}
    for command in [command for command in COMMANDS if command.is_ours and not command.trains_or_checks]:
        words = [re.sub(r"^outputs/2026.*", "RUN", word) for word in command.words]
        ended = cli(*words, *(["--cfg", "job"] if command.marked else []))
        if ended.status:
            failed[command.line] = ended.err
    assert not failed


def heads() -> list[list[str]]:
    """Return the words of each `python -m loraplus_hydra ...` in the YAML files' comments."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(config_folder().rglob("*.yaml")))
    found = (re.findall(rf"^# +{PROGRAM}( [^#\n]*?)?(?:  .*)?$", text, flags=re.MULTILINE) for text in texts)
    return [shlex.split(words) for each in found for words in each]


@pytest.mark.slow
def test_no_command_draws_a_warning_on_its_rates(cli: Callable[..., Finished]) -> None:
    inspected = 0
    for words in [*(command.words for command in OF_RUNS), *heads()]:
        words = [word for word in first_values(words) if "=" in word and not word.startswith("hparams_search")]
        ended = cli("inspect", "--json", *words)
        if ended.status == 0:  # otherwise it names a model or a plugin that isn't here
            inspected += 1
            assert json.loads(ended.out)["advice"] == [], words
    assert inspected > 40


def write_files() -> None:
    """Write the files that commands name into the current folder."""
    for name, row in FILES.items():
        rows = [{key: text.format(n=n, odd=n % 2) for key, text in row.items()} for n in range(40)]
        lines = [json.dumps(row) for row in rows]
        if name.endswith(".csv"):
            lines = [",".join(each) for each in (row, *(made.values() for made in rows))]
        Path(name).write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in OF_RUNS if not each.marked], ids=by_line)
def test_command_runs(command: PageCommand, cli: Callable[..., Finished], tiny_model: Path) -> None:
    """Each command runs, with fewer steps and rows."""
    write_files()
    shutil.copytree(tiny_model, "my_model")
    words = command.words
    has_rungs = words[:1] == ["tune"] or {"halving=true", "hparams_search=halving"} & {*words}
    # The first rung is at 1/16 of the steps, and not before step 6.
    short = SHORT | ({"trainer.max_steps": "96"} if has_rungs else {})
    added = [f"{key}={value}" for key, value in short.items()]  # of two values of a key, Hydra takes the last
    if {"experiment=toy", "hparams_search=toy", "--help", "--cfg"} & {*words}:  # the toy has no rows
        added = []
    ended = cli(*words, *added)
    if any(text in ended.err for text in NO_EXTRA):
        pytest.skip("it needs an extra")
    assert ended.status == (1 if any(wrong in command.line for wrong in WRONG_ON_PURPOSE) else 0), ended.err
