"""Checkpoints are loaded without running code from them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from loraplus_hydra.errors import UserError
from loraplus_hydra.training.hf_trainer.safe_loads import refuse_code, weights_only_loads


class Code:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("code_was_run",)


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("forced", [None, "1"])
def test_load_that_asks_for_everything_gets_weights_only(forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    before = dict(os.environ)
    torch.save({"weight": torch.ones(2), "more": Code()}, "state.pt")
    with pytest.raises(UserError, match="could run code"), weights_only_loads():
        torch.load("state.pt", weights_only=False)
    assert not Path("code_was_run").exists()
    torch.save({"weight": torch.ones(2)}, "state.pt")
    with weights_only_loads():
        assert torch.load("state.pt", weights_only=False)["weight"].tolist() == [1, 1]
    assert dict(os.environ) == before


def test_metadata_of_shards_that_torch_wrote_are_accepted(tmp_path: Path) -> None:
    state = {"exp_avg": torch.zeros(3, 4, dtype=torch.bfloat16), "step": torch.tensor(1.0), "groups": [{"lr": 1e-3}]}
    dcp.save({"state": state}, checkpoint_id=tmp_path / "checkpoint" / "optimizer_0", no_dist=True)
    refuse_code(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Code()),
        b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x94\x8c\x09os.system\x94\x93\x94.",
        b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x94\x8c\x02os\x94\x93\x94.",
        b"\x80\x04\x8c\x05torch\x94\x8c\x04load\x94\x93\x94.",
        b"",
        b"not a pickle",
    ],
    ids=["a call", "a function of a module that it imports", "a module", "a function of torch", "empty", "text"],
)
def test_metadata_that_could_run_code_are_refused(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / "pytorch_model_fsdp_0"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="isn't only a description of tensors"):
        refuse_code(tmp_path / "checkpoint")
    assert not (tmp_path / "code_was_run").exists()
