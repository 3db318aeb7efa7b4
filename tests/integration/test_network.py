"""The network: nothing is fetched unless a config names a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from loraplus_hydra.io.quiet_libraries import ENVIRONMENT

GUARD = """
import os, socket, sys

tried = []


def refuse(*arguments, **more):
    tried.append(arguments[:2])
    raise OSError("no network here")


connect = socket.socket.connect
socket.getaddrinfo = refuse
socket.create_connection = refuse
socket.socket.connect = lambda self, to: connect(self, to) if self.family == socket.AF_UNIX else refuse(to)

from hydra.core.global_hydra import GlobalHydra
from loraplus_hydra.cli.main import main
from loraplus_hydra.io.quiet_libraries import quiet_libraries

quiet_libraries()  # as `main` does, before the next line imports the libraries
from loraplus_hydra.runs import job

job.draw_training = lambda *_: None  # a third of the run, and nothing that could need a network

for words in ARGUMENTS:
    GlobalHydra.instance().clear()
    os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv[1:] = words
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    print("ENDED", words[0], status, tried)
try:
    socket.create_connection(("localhost", 9))
except OSError:
    print("SEEN", len(tried))
"""


def ended_without_network(arguments: list[list[str]], folder: Path) -> list[str]:
    """How commands ended in a process without a network, to which nothing says that it should stay offline."""
    said = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", *ENVIRONMENT)  # other tests in this process set ENVIRONMENT
    env = {name: value for name, value in os.environ.items() if name not in said}
    root = Path(__file__).resolve().parents[2]
    code = GUARD.replace("ARGUMENTS", repr(arguments))
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env={**env, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    ends = [line for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert len(ends) == len(arguments), done.stderr
    assert "SEEN 1" in done.stdout, "the guard sees a connection"
    return ends


def test_nothing_is_fetched_unless_a_config_names_a_hub(tiny_run: list[str], tmp_path: Path) -> None:
    commands = [
        *(["check", *tiny_run], ["inspect"], ["inspect", "model=llama3_8b"], ["preview", *tiny_run]),
        [*tiny_run, "trainer.max_steps=1", "hydra.run.dir=run"],
        *(["predict", "run", "text=say"], ["export", "run"], ["export", "run", "merge=false"]),
        ["export", "run", "target=vllm"],
    ]
    for end in ended_without_network(commands, tmp_path):
        assert end.endswith(" 0 []"), end
