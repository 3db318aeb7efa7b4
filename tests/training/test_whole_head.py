"""An adapter on the output layer learns under TRL's trainers as it does under the model's own loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.base_model import load_base
from loraplus_hydra.models.tokenizer import load_tokenizer, new_token_ids
from loraplus_hydra.tasks.examples import load_examples
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.prepare import bundle
from tests.conftest import Finished
from tests.support.architectures import checkpoint


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", ["model.add_tokens=['<call>']"]),
        ("qwen2", ["model.add_tokens=['<call>']"]),
        ("llama", ["+adapter.modules_to_save=[lm_head]"]),
        ("llama", []),
    ],
)
def test_sft_loss_and_gradients_are_the_models_own(
    architecture: str, overrides: list[str], rows: Path, tmp_path: Path, compose: Callable[..., Any]
) -> None:
    base = checkpoint(architecture, tmp_path / "base")
    config = compose("model=hub", f"model.path={base}", "data=jsonl", f"data.train={rows}", *overrides)
    config.adapter.init_lora_weights = False  # nothing starts at zero, so that every gradient tells
    tokenizer = load_tokenizer(config.model)
    examples = load_examples(config, tokenizer)
    torch.manual_seed(0)
    ids = new_token_ids(tokenizer, config.model)
    model = add_adapter(load_base(config, tokenizer), config.adapter, "CAUSAL_LM", new_tokens=ids)
    trainer = make_trainer(bundle(config, tokenizer, examples, model), tmp_path)
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    for index in ids:
        batch["input_ids"][:, 1] = index

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        loss.backward()
        return {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
        }

    own_loss = model(**batch).loss
    own = gradients(own_loss)
    trls_loss = trainer.compute_loss(model, dict(batch))
    trls = gradients(trls_loss)
    torch.testing.assert_close(trls_loss, own_loss)
    for name, gradient in own.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(trls[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    evaluated = trainer.evaluate()
    assert 0 <= evaluated["eval_mean_token_accuracy"] <= 1
    assert evaluated["eval_entropy"] > 0
    assert trainer.model.generate(input_ids=batch["input_ids"][:1, :4], max_new_tokens=2).shape == (1, 6)


def test_an_adapters_layer_on_the_output_layer_is_refused_before_trl_does(
    cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, "adapter.target_modules=[q_proj,lm_head]")
    assert ended.status == 1
    assert "adapter.target_modules: TRL's SFTTrainer can't train an adapter on the output layer" in ended.err
