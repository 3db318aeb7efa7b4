"""Quantised weights that FSDP can't split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from accelerate.state import AcceleratorState

from tests.conftest import Finished

FSDP = ("trainer=fsdp2", "trainer.use_cpu=true", "trainer.bf16=false")
STORAGE = "+quantization.bnb_4bit_quant_storage"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["quantization=nf4"], "quantization.bnb_4bit_quant_storage: FSDP splits only floating-point tensors"),
        (["quantization=nf4", f"{STORAGE}=int8"], "4-bit weights are stored as int8"),
        (["quantization=int8"], "quantization: FSDP can't split 8-bit weights"),
        (["quantization=nf4", f"{STORAGE}=bfloat16", "model.dtype=bfloat16"], None),
        ([], None),
    ],
)
def test_quantised_weights_are_refused_unless_fsdp_can_split_them(
    overrides: list[str],
    problem: str | None,
    cli: Callable[..., Finished],
    tiny_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")  # otherwise accelerate sets it, and later tests would keep it
    finished = cli("check", *tiny_run, *FSDP, *overrides)
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # half made, because there is no second process; later tests would search for it
    if problem is None:
        assert "quantization" not in finished.err
    else:
        assert finished.status == 1
        assert problem in finished.err
