"""The Trainer of the toy."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer


class StudentTrainer(Trainer):
    """transformers' Trainer, which also reports `eval_log10_loss`."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = output.metrics[f"{prefix}_loss"]
        # Losses differ by up to ten powers of ten, so the logarithm is easier to compare.
        output.metrics[f"{prefix}_log10_loss"] = math.log10(max(loss, 1e-30))
        return output
