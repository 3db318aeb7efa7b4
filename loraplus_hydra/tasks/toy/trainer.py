"""The Trainer of the toy."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer


class StudentTrainer(Trainer):
    """transformers' Trainer, with `eval_log10_loss` beside `eval_loss`."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = output.metrics[f"{prefix}_loss"]
        # Losses differ by ten powers of ten.
        output.metrics[f"{prefix}_log10_loss"] = math.log10(max(loss, 1e-30))
        return output
