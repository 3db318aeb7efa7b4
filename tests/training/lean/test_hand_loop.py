"""Fifty float64 steps of a Trainer under the lean forward, against a loop written by hand over padded batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from loraplus_hydra.loraplus.optimizer import create_loraplus_optimizer
from loraplus_hydra.training.lean.adopt import adopt
from loraplus_hydra.training.lean.forward import LeanForward
from tests.support.lean import IGNORED, VOCABULARY, adapted, assert_close

STEPS, BATCH = 50, 3


def rows() -> list[tuple[list[int], list[int]]]:
    """Rows of 2 to 40 tokens and their labels, some without any."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(STEPS * BATCH):
        ids = torch.randint(2, VOCABULARY, (2 + index * 7 % 39,), generator=generator)
        loss = torch.rand(len(ids), generator=generator) < (0.0 if index % 10 == 0 else 0.4)
        loss[-1] |= index % 10 != 0
        made.append((ids.tolist(), ids.masked_fill(~loss, IGNORED).tolist()))
    return made


def collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        parts = [torch.tensor(each[name]) for each in features]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(each["input_ids"]) for each in features])
    ones = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": ones}


def by_trainer(model: Any, folder: Path) -> list[float]:
    from tests.support.architectures import tokenizer

    args = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0.3,
        logging_steps=1,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
    )
    data = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows()])
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer(),
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    adopt(trainer, "lean")
    own, losses = LeanForward.fused_output, []

    def recorded(self: LeanForward, batch: Any) -> Any:
        output = own(self, batch)
        if self.model.training:  # not the check on the first batch
            losses.append((-output.log_probs.sum() / output.label_mask.sum()).item())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeanForward, "fused_output", recorded)
        trainer.train()
    return losses


def by_hand(model: Any) -> list[float]:
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base, made, losses = model.get_base_model(), rows(), []
    model.train()
    for step in range(STEPS):
        batch = collate(
            [{"input_ids": ids, "labels": labels} for ids, labels in made[step * BATCH : (step + 1) * BATCH]]
        )
        hidden = base.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        logits, labels = base.lm_head(hidden[:, :-1]), batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED])
        loss.backward()
        losses.append(loss.item())
        clip_grad_norm_(trained, 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_losses_and_weights_are_those_of_a_loop_by_hand(tmp_path: Path, targets: Any) -> None:
    make: Callable[[], Any] = lambda: adapted("llama", r=3, lora_alpha=6, target_modules=targets)  # noqa: E731
    ours, reference = make(), make()

    losses = by_trainer(ours, tmp_path)
    expected = by_hand(reference)

    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-12)
    assert_close(
        [each.detach() for each in ours.parameters() if each.requires_grad],
        [each.detach() for each in reference.parameters() if each.requires_grad],
        1e-12,
    )
