"""The README says what is so: its commands compose, its table of options is that of conf/, its figures are measured."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.io.result import OK, Result
from tests.conftest import Finished
from tests.support.finished_sweeps import write_job, write_sweep

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every `python -m loraplus_hydra ...` of a shell block, its comment and line breaks taken away."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line.partition(" # ")[0].strip() for line in lines if line.startswith("python -m loraplus_hydra")]
    return found


def of_a_run(command: str) -> bool:
    """Whether the command composes a run, and not a finished one's export or the like."""
    words = shlex.split(command)[3:]
    return not words or words[0] not in COMMANDS or COMMANDS[words[0]].config == "config"


@pytest.mark.parametrize("command", [command for command in commands() if of_a_run(command)])
def test_command_composes(command: str, cli: Callable[..., Finished]) -> None:
    words = [word for word in shlex.split(command)[3:] if word not in ("-m", "--help", "--cfg", "job")]
    words = [re.sub(r"=([^{\[(]*?),.*", r"=\1", word) for word in words]  # a sweep's first value
    finished = cli(*words, "--cfg", "job")
    if "an option of a plugin of Hydra's that isn't installed here" in finished.err:
        pytest.skip("it needs an extra")
    assert finished.status == 0, finished.err


def test_commands_behind_a_run_do_what_they_say(
    cli: Callable[..., Finished], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ["model=hub", f"model.path={tiny_model}", "data.max_samples=8", "trainer.max_steps=2", "task.samples=0"]
    ended = cli(*tiny, "hydra.run.dir=RUN")  # on the default's rows
    assert ended.status == 0, ended.err
    Path("other.jsonl").write_text('{"prompt": "def one(): return 1", "completion": "Return one."}\n')
    write_sweep(Path("outputs/sweeps/NAME"))
    write_job(Path("outputs/sweeps/NAME/ratio-4"), {"loraplus.ratio": 4}, 3.5)
    # What `resume` trains isn't the README's; whether it would is found before.
    monkeypatch.setattr("loraplus_hydra.runs.job.run", lambda *_: Result(OK, "eval_loss"))
    failed = {}
    for command in [command for command in commands() if not of_a_run(command)]:
        ended = cli(*(re.sub(r"^outputs/2026.*", "RUN", word) for word in shlex.split(command)[3:]))
        if ended.status:
            failed[command] = ended.err
    assert not failed


def test_readme_has_commands() -> None:
    assert len(commands()) >= 8


def test_table_lists_every_option_of_every_group() -> None:
    rows = dict(re.findall(r"^\| `([\w/]+)` \| (.*?) \|", README, flags=re.MULTILINE))
    for folder in sorted(
        path for path in config_folder().iterdir() if path.is_dir() and not path.name.startswith("__")
    ):
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        if options:
            assert folder.name in rows, f"the README's table lacks the group {folder.name}"
            assert sorted(re.findall(r"`([\w.]+)`", rows[folder.name])) == options, folder.name


def test_makefile_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
