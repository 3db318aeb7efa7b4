"""A run outlives the reader of its output."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from loraplus_hydra.io.streams import lost_output, make_streams_last
make_streams_last()
for number in range(3):
    print("line", number, flush=True)
lost = lost_output()
print(f"lost: {lost}", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("redirection", "lost"), [(">&-", ""), ("> /dev/full", "No space left on device"), ("| true", ""), ("", "")]
)
def test_output_that_nobody_takes_is_dropped(redirection: str, lost: str) -> None:
    command = f'set -o pipefail; "{sys.executable}" -c "$0" {redirection}'
    finished = subprocess.run(["bash", "-c", command, PROGRAM], capture_output=True, text=True, check=False)
    assert finished.returncode == 0
    assert finished.stderr == f"lost: {lost}\n"


def test_unbuffered_output_comes_at_once() -> None:
    """Containers set PYTHONUNBUFFERED, so that a log shows each line when it is printed."""
    program = (
        "import os; from loraplus_hydra.io.streams import make_streams_last as last; last(); print(1); os._exit(0)"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    assert subprocess.run(command, capture_output=True, env=environment, check=True).stdout == b"1\n"
