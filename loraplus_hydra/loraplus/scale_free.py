"""Optimizers whose steps don't depend on the gradient's scale.

This module loads no torch, so the report can import it.
"""

from __future__ import annotations

# Not RAdam: its first steps are not divided by the gradient's size
_SCALE_FREE = ("adam", "adamw", "nadam", "lion", "muon", "ademamix", "riemannianadamw", "adamwschedulefree")
_ADAM = ("adam", "adamw", "nadam", "radam", "adamax")
_WITHOUT_EPS = ("lion",)


def is_scale_free(optimizer: str) -> bool:
    """Return True if this class's steps don't depend on the gradient's scale, except for eps."""
    return _plain_name(optimizer) in _SCALE_FREE


def has_eps(optimizer: str) -> bool:
    """Return True if this class adds eps to the size of the gradient."""
    return _plain_name(optimizer) not in _WITHOUT_EPS


def is_adam(optimizer: str) -> bool:
    """Return True for the classes to which a rate published for Adam applies."""
    return _plain_name(optimizer) in _ADAM


def _plain_name(optimizer: str) -> str:
    return optimizer.lower().removeprefix("paged").removesuffix("8bit").removesuffix("32bit")
