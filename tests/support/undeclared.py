"""Functions for a config that don't declare what they return."""

from __future__ import annotations

from typing import Any


def schedule(optimizer: Any):
    raise AssertionError("a function that declares nothing is not called")


rows = examples = schedule
