"""Pages that are followed from top to bottom: their blocks of Python and commands run in order, in an empty folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.support.page_commands import PAGES, PROGRAM

BLOCK = re.compile(r"```(python|bash|text)\n(.*?)```", flags=re.DOTALL)


def commands(language: str, block: str) -> list[list[str]]:
    """Words of each command of a block. In blocks of text a command has a `$` before it."""
    lines = block.replace("\\\n", " ").splitlines()
    starts = f"$ {PROGRAM}" if language == "text" else PROGRAM
    found = [shlex.split(line.partition(" # ")[0].removeprefix("$ ")) for line in lines if line.startswith(starts)]
    return [words[3:] for words in found]


@pytest.mark.slow
def test_classifier_answers_as_the_page_says(cli: Callable[..., Finished]) -> None:
    shown: list[str] = []
    printed = ""
    for language, block in BLOCK.findall(PAGES["docs/howto/classification.md"].read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, "page", "exec"), {})
            continue
        shown += [line for line in block.splitlines() if line.startswith("{")]
        for words in commands(language, block):
            ended = cli(*words)
            assert ended.status == 0, ended.err
            printed += ended.out
    assert len(shown) == 2
    answers = [json.loads(line) for line in printed.splitlines() if line.startswith('{"text"')]
    assert [answer["label"] for answer in answers[:2]] == [json.loads(line)["label"] for line in shown]
    assert "1.0000 after 110 steps" in printed
    assert len(Path("answers.jsonl").read_text().splitlines()) == 210


@pytest.mark.slow
def test_first_run_answers_and_own_rows_train(cli: Callable[..., Finished]) -> None:
    text = PAGES["docs/start/first-run.md"].read_text(encoding="utf-8")
    for language, block in BLOCK.findall(text.partition("## 5.")[0]):
        if language == "python":
            exec(compile(block, "page", "exec"), {})
            continue
        for words in commands(language, block):
            new = words[:1] in ([], ["data=jsonl"]) and language == "bash"
            ended = cli(*words, *(["hydra.run.dir=" + ("rows" if words else "RUN")] if new else []))
            assert ended.status == (1 if language == "text" else 0), ended.err
            errors = [line for line in block.splitlines() if line.startswith("  - ")]
            assert [line for line in errors if line not in ended.err] == []
            if words[:1] == ["predict"]:
                assert "the b" in json.loads(ended.out.splitlines()[-1])["answer"]


@pytest.mark.slow
def test_own_repository_trains_with_its_optimizer(tmp_path: Path) -> None:
    text = PAGES["docs/howto/repository.md"].read_text(encoding="utf-8")
    files = re.findall(r"```(?:yaml|python)\n# (my_research/\S+)\n(.*?)```", text, flags=re.DOTALL)
    assert len(files) == 4
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    short = ["lora.trainer.max_steps=2", "lora.task.samples=0", "lora.data.max_samples=32", "hydra.run.dir=run"]
    command = [sys.executable, "train.py", "lora.loraplus.ratio=8", *short]
    ended = subprocess.run(command, cwd=tmp_path / "my_research", capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "a key of this repository ok" in ended.stdout
    tensors = json.loads((tmp_path / "my_research" / "run" / "param_groups.json").read_text())
    assert {tensor["role"]: tensor["lr"] for tensor in tensors} == pytest.approx({"lora_A": 1e-4, "lora_B": 8e-4})
