"""LoRA-FA: lora_A stays frozen, and the gradient of lora_B is projected (arXiv 2308.03303).

The step is PEFT's. PEFT's class finds pairs by names and neighbours in one group, and keeps its state by name. This
class keeps the groups of the trained tensors, with a state for each tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from loraplus_hydra.loraplus.factor_pairs import Pair, PairedOptimizer


class LoraFA(PairedOptimizer):
    """PEFT's LoRA-FA on groups with rates of their own. Tensors outside the pairs are updated by AdamW."""

    trains_a: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        from peft.optimizers.lorafa import LoraFAOptimizer  # takes seconds; only this class needs it

        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        self._peft = LoraFAOptimizer([nn.Parameter(torch.empty(0))], **settings)  # checks the values
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take PEFT's step, with groups and states as PEFT expects them."""
        pairs = {id(pair.b): pair for pair in self.known_pairs()}
        self._peft.state = defaultdict(dict)
        self._peft.param_groups = [self._as_peft(group, pairs) for group in self.param_groups]
        return self._peft.step(closure)

    def _as_peft(self, group: dict[str, Any], pairs: Mapping[int, Pair]) -> dict[str, Any]:
        """Return a group with each lora_A before its lora_B, and give PEFT the states of the group's tensors."""
        parameters: list[nn.Parameter] = []
        names: list[str] = []
        scalings: list[float | None] = []
        for parameter in group["params"]:
            if parameter.grad is None:  # of an expert that saw no token
                continue
            # Not the model's own names, because PEFT also takes a layer called `lora_block` for a factor
            name, pair = f"{len(self._peft.state)}.", pairs.get(id(parameter))
            self._peft.state[name + "lora" if pair else name] = self.state[parameter]
            parameters += [pair.a, parameter] if pair else [parameter]
            names += [f"{name}lora_A", f"{name}lora_B"] if pair else [name]
            scalings += [pair.scaling] * 2 if pair else [None]
        return {**group, "params": parameters, "names": names, "scaling_factors": scalings}
