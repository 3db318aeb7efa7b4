"""Mutated folders of runs and sweeps: every command works on them, or ends as a listed error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.forked import COUNT, driven


@pytest.mark.slow
def test_any_folder_is_read_or_a_listed_error(tiny_run: list[str], tmp_path: Path) -> None:
    seen = driven("folders", tmp_path, COUNT or 100, *tiny_run)
    faults = [trial for trial in seen if trial["fault"]]
    assert not faults, "\n".join(map(str, faults))
    assert {trial["status"] for trial in seen} == {0, 1}
