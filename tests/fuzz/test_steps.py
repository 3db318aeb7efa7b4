"""One-step runs of random configs and spoilt rows: what the check passes, trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.forked import COUNT, driven


@pytest.mark.slow
def test_what_the_check_passes_trains(tiny_run: list[str], tmp_path: Path) -> None:
    seen = driven("steps", tmp_path, COUNT or 200, *tiny_run)
    faults = [trial for trial in seen if trial["fault"]]
    assert not faults, "\n".join(map(str, faults))
    assert {trial["status"] for trial in seen} == {0, 1}
