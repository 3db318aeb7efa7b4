"""A rank that is probably a typo is an error; the rank of each expert counts, not that of all experts together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from transformers import MixtralConfig

from loraplus_hydra.check.dry_run import plan_without_weights
from loraplus_hydra.errors import ConfigErrors

EXPERTS = 64


@pytest.mark.parametrize(("rank", "is_valid"), [(8, True), (330, False)])  # the largest side is 32
def test_rank_of_an_expert_is_compared_with_the_sides_of_the_weights(
    rank: int, is_valid: bool, tmp_path: Path, compose: Callable[..., DictConfig]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=EXPERTS, **sizes).save_pretrained(tmp_path)
    targets = ("adapter.target_modules=[q_proj]", "+adapter.target_parameters=[experts.gate_up_proj]")
    config = compose("model=hub", f"model.path={tmp_path}", *targets, f"adapter.r={rank}")
    if is_valid:
        _, plan = plan_without_weights(config, None)
        assert max(max(record.shape) for record in plan.records) == rank * EXPERTS
        return
    with pytest.raises(ConfigErrors, match=r"adapter\.r: 330 is far above .* 32;"):
        plan_without_weights(config, None)
