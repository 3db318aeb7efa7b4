"""Rows of single tokens in an adapter that training goes on with: the same tokens, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from loraplus_hydra.check.problems import check_config
from loraplus_hydra.errors import ConfigErrors
from tests.support.architectures import VOCABULARY, base_of, checkpoint

AA, BB = "'<aa>'", "'<bb>'"
TRAINED = r"model\.add_tokens: the adapter was trained with <aa>, <bb> \(ids 300, 301\)"
SAME = ["adapter.r=4", "adapter.lora_alpha=8", "adapter.target_modules=[q_proj]"]
ROWS = "+adapter.trainable_token_indices="


def saved(base: Path, folder: Path, indices: Any, *tokens: str) -> Path:
    """Save an adapter as PEFT alone does, beside the tokenizer with the new tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), base_of(base, "qwen2")
    tokenizer.add_tokens(list(tokens))
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=indices
    )
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checked(compose: Callable[..., Any], rows: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that checks a run which begins from the adapter in `adapter`, and returns its model."""

    def check(*overrides: str, adapter: str = "adapter", base: str = "base") -> Any:
        places = [f"model.path={tmp_path / base}", f"data.train={rows}", f"adapter.path={tmp_path / adapter}"]
        config = compose("model=hub", "data=jsonl", "trainer.max_steps=2", *places, *overrides)
        return check_config(config, with_data=True).model

    return check


def test_new_tokens_are_those_of_the_stored_adapter(checked: Callable[..., Any], tmp_path: Path) -> None:
    saved(checkpoint("qwen2", tmp_path / "base"), tmp_path / "adapter", {"embed_tokens": [300, 301]}, "<aa>", "<bb>")
    checked("adapter=existing", f"model.add_tokens=[{AA},{BB}]")
    for wrong in (f"{BB},{AA}", "'<xx>','<yy>'", f"{AA},{BB},'<cc>'"):
        with pytest.raises(ConfigErrors, match=TRAINED):
            checked("adapter=existing", f"model.add_tokens=[{wrong}]")
    with pytest.raises(ConfigErrors, match="there is no token 300"):
        checked("adapter=existing")
    (tmp_path / "adapter" / "tokenizer.json").unlink()  # as PEFT's own folders
    checked("adapter=existing", "model.add_tokens=['<xx>','<yy>']")
    with pytest.raises(ConfigErrors, match="the adapter was trained with the new tokens of ids 300, 301"):
        checked("adapter=existing", f"model.add_tokens=[{AA},{BB},'<cc>']")


def test_new_tokens_are_compared_in_an_embedding_with_spare_rows(checked: Callable[..., Any], tmp_path: Path) -> None:
    base = checkpoint("qwen2", tmp_path / "base", vocab_size=VOCABULARY + 84)
    saved(base, tmp_path / "adapter", {"embed_tokens": [300, 301]}, "<aa>", "<bb>")
    checked("adapter=existing", f"model.add_tokens=[{AA},{BB}]")
    with pytest.raises(ConfigErrors, match=TRAINED):
        checked("adapter=existing", f"model.add_tokens=[{BB},{AA}]")


def test_configured_rows_are_those_of_the_stored_adapter(checked: Callable[..., Any], tmp_path: Path) -> None:
    base = checkpoint("qwen2", tmp_path / "base")
    stored = {"embed_tokens": [7, 300, 301]}
    saved(base, tmp_path / "adapter", stored, "<aa>", "<bb>")
    saved(base, tmp_path / "listed", [7, 8])
    tokens = f"model.add_tokens=[{AA},{BB}]"
    for rows in ("{embed_tokens: [7]}", "{model.embed_tokens: [300,7,301]}", "[7]"):
        model = checked(*SAME, f"{ROWS}{rows}", tokens)
        assert model.active_peft_config.trainable_token_indices == stored
    differs = r"adapter\.trainable_token_indices: is .*, but \{'embed_tokens': \[7, 300, 301\]\} in the adapter at"
    for rows in ("{embed_tokens: [7,8]}", "{embed_tokens: [8]}", "{lm_head: [7]}"):
        with pytest.raises(ConfigErrors, match=differs):
            checked(*SAME, f"{ROWS}{rows}", tokens)
    with pytest.raises(ConfigErrors, match=differs):
        checked(*SAME, f"{ROWS}[7]")
    checked(*SAME, f"{ROWS}[8,7]", adapter="listed")
    with pytest.raises(ConfigErrors, match=r"is None, but \[7, 8\] in the adapter at"):
        checked(*SAME, adapter="listed")
