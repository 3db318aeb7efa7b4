"""Imports of rooms in a fresh process: light rooms load no torch, and LoRA+ itself needs no Hydra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded_by(room: str) -> set[str]:
    """Return the top-level modules that importing every module of a room loads."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"import loraplus_hydra.{room} as room\n"
        "for module in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("room", ["config", "io", "report"])
def test_light_rooms_load_no_torch(room: str) -> None:
    assert loaded_by(room).isdisjoint({"torch", "transformers", "peft", "trl", "datasets"})


def test_loraplus_loads_neither_hydra_nor_omegaconf() -> None:
    loaded = loaded_by("loraplus")
    assert loaded.isdisjoint({"hydra", "omegaconf", "transformers"})
    assert "torch" in loaded
