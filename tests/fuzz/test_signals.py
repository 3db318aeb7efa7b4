"""Signals at random moments: none is lost, the status is right, and what goes on has equal bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.forked import COUNT, driven


@pytest.mark.slow
def test_signal_at_any_moment_is_kept_and_loses_nothing(tiny_run: list[str], tmp_path: Path) -> None:
    seen = driven("signals", tmp_path, COUNT or 40, *tiny_run)
    faults = [trial for trial in seen if trial["faults"]]
    assert not faults, "\n".join(map(str, faults))
    assert sum(trial["sent"] for trial in seen) > len(seen) / 2
