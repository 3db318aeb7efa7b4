"""What a run says: the same on the screen and in its log file, short in a sweep, and nothing that isn't the case."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from loraplus_hydra.io.result import Result
from loraplus_hydra.loraplus.memory import Memory
from loraplus_hydra.loraplus.plan import Row
from loraplus_hydra.runs import display
from loraplus_hydra.training.hf_trainer.step_memory import StepMemory
from tests.conftest import Finished

Cli = Callable[..., Finished]
TREE, RATES, SAMPLES = "keys have their defaults", "What gets which rate", "Held-out prompts"


def bare(text: str) -> str:
    """Without what wrapping changes, nor a log line's beginning."""
    return re.sub(r"[\s│├└─]+", "", re.sub(r"^\[[^]]*\]\[[^]]*\]\[[^]]*\] - ", "", text, flags=re.MULTILINE))


def test_all_that_a_run_says_is_in_its_log_file_too(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    finished = cli(*tiny_run, f"hydra.run.dir={tmp_path / 'run'}")
    log = (tmp_path / "run" / "loraplus_hydra.log").read_text()
    assert [line for line in finished.out.splitlines() if bare(line) not in bare(log)] == []
    for part in (TREE, RATES, SAMPLES, "Next: "):
        assert (finished.out.count(part), log.count(part)) == (1, 1), part


def test_commands_for_the_finished_run_can_be_pasted(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    finished = cli(*tiny_run, "trainer.max_steps=1", "hydra.run.dir='a run'")
    commands = re.findall(r"^  python -m loraplus_hydra (.*)$", finished.out, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["predict", "chat", "export", "resume"]
    for command in commands:
        words = shlex.split(command)
        assert Path(words[1]) == tmp_path / "a run", command
        assert cli(*words, "--cfg", "job").status == 0, command


def test_inspect_shows_its_tables_once(cli: Cli, tiny_run: list[str]) -> None:
    assert cli("inspect", *tiny_run).out.count(RATES) == 1


def test_sweep_shows_config_and_rates_once_and_a_line_for_each_end(
    cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplus_hydra.sweep.finish._report", lambda _: ())
    said = cli("-m", *tiny_run, "trainer.max_steps=1", "loraplus.ratio=2,3,4").out
    assert (said.count(TREE), said.count(RATES), said.count(SAMPLES), said.count("Next: ")) == (1, 1, 0, 0)
    folders = sorted((tmp_path / "outputs" / "sweeps").glob("*/ratio-*"))
    ends = re.findall(r"^eval_loss: \S+ before training, \S+ after 1 steps; \d+ s, in (\S+)$", said, re.MULTILINE)
    assert ends == [folder.name for folder in folders]
    assert len(ends) == 3
    for folder in folders:
        log = (folder / "loraplus_hydra.log").read_text()
        assert (log.count(TREE), log.count(RATES), log.count(SAMPLES)) == (1, 1, 1)


SEARCH = "a search for rate and ratio (python -m loraplus_hydra tune)"


@pytest.mark.parametrize(
    ("optimizer", "data", "trainer", "said"),
    [
        (
            "torch.optim.AdamW",
            "loraplus_hydra.data.embedded.load",
            {},
            f"Next: {SEARCH}, an 8-bit optimizer (optimizer=adamw8bit), your own rows (data=jsonl).",
        ),
        ("torch.optim.SGD", "my.load", {}, f"Next: {SEARCH}, an 8-bit optimizer (optimizer=adamw8bit)."),
        ("torch.optim.AdamW", "my.load", {"deepspeed": {"bf16": {}}}, f"Next: {SEARCH}."),
        ("bitsandbytes.optim.Lion8bit", "loraplus_hydra.data.files.load", {}, f"Next: {SEARCH}."),
    ],
)
def test_only_what_the_run_has_not_done_is_suggested(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optimizer: str, data: str, trainer: dict[str, Any], said: str
) -> None:
    config = {"optimizer": {"_target_": optimizer}, "data": {"_target_": data}, "trainer": trainer}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    caplog.set_level(logging.INFO, "loraplus_hydra")
    display.show_result(tmp_path, Result(status="ok", metric="eval_loss"))
    assert [one for one in caplog.messages if one.startswith("Next")] == [said]


def test_titles_stand_on_one_line_and_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    step = StepMemory(2, 8, reason="[/mine]")
    display.show_memory(Memory(weights=2**20, adapter=2**20, gradients=2**20, optimizer=2**21), step)
    display.show_rates([Row("lora_A", "[/mine]", "[bold]", 1e-4, 0.0, 32, 1, 8)])
    lines = capsys.readouterr().out.splitlines()
    assert {"Memory of training, estimated", RATES} <= set(lines)
    assert any("[/mine]" in line and "[bold]" in line for line in lines)


def test_run_behind_a_sweep_in_the_same_process_is_no_job_of_it(
    cli: Cli, compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    assert cli("-m", *tiny_run, "trainer.max_steps=1", "loraplus.ratio=2,3").status == 0
    assert run(compose(*tiny_run, "trainer.max_steps=1"), tmp_path / "run").status == "ok"
