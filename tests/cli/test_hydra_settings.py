"""Mistakes in Hydra's own node are listed before a folder is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra/job_logging=disabled", "hydra.job_logging"),
        ("hydra/job_logging=none", "hydra.job_logging"),
        ("hydra.job.name=a/b", "hydra.job.name"),
        ("hydra.job_logging.root.handlers=[nope]", "there is no handler 'nope'"),
        ("hydra.job_logging.root.level=LOUD", "there is no level 'LOUD'"),
        ("hydra.verbose={a: 1}", "hydra.verbose"),
        ("--resolve", "needs --cfg"),
        ("hydra.callbacks.before_run.command=nope", "there is no command 'nope'"),
        ("hydra.output_subdir=config.yaml", "hydra.output_subdir"),
    ],
)
def test_late_error_of_hydra_is_listed_first(
    word: str, message: str, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    finished = cli("experiment=toy", "hydra.run.dir=run", word)
    assert finished.status == 1
    assert re.match(r"\d+ errors?:", finished.err)
    assert message in finished.err
    assert not (tmp_path / "run").exists()
