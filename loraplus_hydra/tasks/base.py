"""Properties of the weights that training begins from, which hold whatever the rows suggest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """The trained head and the positions of a base model, or of the run or adapter that is loaded on it."""

    labels: tuple[str, ...] = ()  # names of a trained head's outputs, in their order; empty: no head, or no names
    head: str = "the model's trained head"  # the owner of the labels, for messages
    replaceable: bool = False  # the head can be replaced by a new one
    unnamed_outputs: int = 0  # outputs of a trained head whose labels have no names
    positions: int | None = None  # tokens that the model can take at most; None: no limit
