"""`export` of adapters that plain PEFT wrote: the merged model has the logits of PEFT's own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loraplus_hydra.errors import UserError
from loraplus_hydra.runs.export import export
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.job import run
from tests.support.architectures import TOKENS, checkpoint

EMBEDDING_AND_OUTPUT = ["q_proj", "embed_tokens", "lm_head"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and output layer": {"target_modules": EMBEDDING_AND_OUTPUT},
    "saved, with one weight": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "use_rslora": True},
}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def continued(
    base: Path, settings: dict[str, Any], folder: Path, rows: Path, compose: Callable[..., Any]
) -> tuple[Path, torch.Tensor]:
    """A run that takes one step of rate 1e-12 on an adapter of plain PEFT, and the logits of PEFT's model."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder / "adapter"))
    words = ["model=hub", f"model.path={base}", "adapter=existing", f"adapter.path={folder / 'adapter'}"]
    words += ["data=jsonl", f"data.train={rows}", "task=text", "data.text_column=prompt", "data.completion_column=null"]
    words += ["task.block_size=16", "task.samples=0", "trainer.max_steps=1", "optimizer.lr=1e-12", "loraplus=none"]
    run(compose(*words, "trainer.eval_strategy=no"), folder / "run")
    return folder / "run", logits(model)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_model_has_the_logits_of_pefts_model(
    kind: str, rows: Path, compose: Callable[..., Any], tmp_path: Path
) -> None:
    base = checkpoint("qwen2", tmp_path / "base")  # its output layer is tied to the embedding
    folder, expected = continued(base, ADAPTERS[kind], tmp_path, rows, compose)
    merged = AutoModelForCausalLM.from_pretrained(export(open_run(str(folder)), tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_replicated_layers_are_refused_with_the_reason(rows: Path, compose: Callable[..., Any], tmp_path: Path) -> None:
    base = checkpoint("llama", tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]}
    folder, _ = continued(base, settings, tmp_path, rows, compose)
    with pytest.raises(UserError, match=r"merge: the merged model can't be stored: .*; use merge=false"):
        export(open_run(str(folder)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_int8_base_is_dequantised(tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path) -> None:
    run(compose(*tiny_run, "quantization=int8", "task.samples=0"), tmp_path / "run")
    finished = open_run(str(tmp_path / "run"))
    merged = AutoModelForCausalLM.from_pretrained(export(finished, tmp_path / "merged"))
    assert not hasattr(merged.config, "quantization_config")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
