"""Hydra's plugins, loaded once before the tests of sweeps."""

from __future__ import annotations

import pytest
from hydra.core.plugins import Plugins


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    """Load Hydra's plugins, because Hydra imports its own classes anew then, and tests replace their methods."""
    Plugins.instance()
