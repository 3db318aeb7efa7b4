"""Optimizers that don't train each group at its own rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class OneRate(Optimizer):
    """Keeps one rate for all groups."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **unused: Any) -> None:
        super().__init__(params, {"lr": lr})
        self.lr = lr

    def rate(self, index: int) -> float:
        return self.lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-self.rate(index))


class FirstRates(OneRate):
    """Keeps the groups' first rates, whatever the schedule sets."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **unused: Any) -> None:
        super().__init__(params, lr)
        self.first = [group["lr"] for group in self.param_groups]

    def rate(self, index: int) -> float:
        return self.first[index]


class OneGroup(OneRate):
    """Joins the groups into one."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **unused: Any) -> None:
        super().__init__([parameter for group in params for parameter in group["params"]], lr)
