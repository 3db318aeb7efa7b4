"""AdamW with Riemannian preconditioning of LoRA's gradients (arXiv 2402.02347).

The preconditioner is PEFT's. PEFT's function builds an optimizer with one group; this class keeps the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW

from loraplus_hydra.loraplus.factor_pairs import PairedOptimizer


class RiemannianAdamW(PairedOptimizer, AdamW):
    """AdamW on preconditioned gradients.

    lora_A's gradient is multiplied by (B^T B + reg I)^-1, and lora_B's by (A A^T + reg I)^-1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        reg: float = 1e-2,
        fused: bool | None = None,
    ) -> None:
        if reg <= 0:
            raise ValueError(f"reg must be above 0, got {reg}; lora_B starts at zero, which has no inverse")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        for group in self.param_groups:  # part of the groups, so that a checkpoint has it
            if group.setdefault("reg", reg) != reg:
                raise ValueError("reg is one number for all groups; set optimizer.reg")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition the gradients of the pairs, then take AdamW's step."""
        from peft.optimizers.riemannian import _RiemannianPreconditioner  # takes seconds; only this class needs it

        if closure is not None:
            raise ValueError("a closure would overwrite the preconditioned gradients")
        pairs = [(pair.a, pair.b) for pair in self.known_pairs()]
        _RiemannianPreconditioner(pairs, self.param_groups[0]["reg"]).step()
        return super().step()
