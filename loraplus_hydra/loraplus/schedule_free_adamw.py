"""Schedule-free AdamW, from the package `schedulefree`, which is an extra."""

from __future__ import annotations

from functools import cache
from typing import Any

from loraplus_hydra.loraplus.schedule_free import ScheduleFree


def __getattr__(name: str) -> Any:
    if name != "AdamWScheduleFree":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _made()


def __dir__() -> list[str]:
    return [*globals(), "AdamWScheduleFree"]


@cache
def _made() -> type[ScheduleFree]:
    """Make the class on top of the package's. Raises ImportError without the package."""
    try:
        import schedulefree
    except ModuleNotFoundError as error:
        raise ImportError("it needs the package schedulefree: pip install 'loraplus_hydra[schedulefree]'") from error

    class AdamWScheduleFree(ScheduleFree, schedulefree.AdamWScheduleFree):
        """The package's AdamW, whose switch to the averaged weights and back is exact."""

        __module__, __qualname__ = __name__, "AdamWScheduleFree"

        def __init__(
            self,
            params: Any,
            lr: float = 2.5e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0.0,
            warmup_steps: int = 0,
            r: float = 0.0,
            weight_lr_power: float = 2.0,
            foreach: bool = True,
        ) -> None:
            arguments: Any = (lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power, foreach)
            super().__init__(params, *arguments)
            for group in self.param_groups:
                if not 0 < group["betas"][0] < 1:  # the package divides by it
                    raise ValueError(f"the first of betas must be above 0 and below 1, got {group['betas'][0]}")
            self.train()

    return AdamWScheduleFree
