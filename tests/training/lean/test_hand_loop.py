"""Float64 steps of a Trainer under the lean forward, against a loop written by hand over padded batches."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import get_scheduler
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from loraplus_hydra.loraplus.optimizer import create_loraplus_optimizer
from loraplus_hydra.training.lean.adopt import adopt
from loraplus_hydra.training.lean.forward import LeanForward
from tests.support.architectures import tokenizer
from tests.support.lean import IGNORED, VOCABULARY, adapted, assert_close

Row = tuple[list[int], list[int]]  # token ids and their labels
LENGTHS = (2, 3, 7, 16, 40)
# Of a row's tokens, by a number in [0, 1) each: those that carry loss.
MASKS = {
    "none": lambda chances: chances < 0,
    "all": lambda chances: chances >= 0,
    "some": lambda chances: chances < 0.4,
    "the last": lambda chances: torch.arange(len(chances)) == len(chances) - 1,
    "the first": lambda chances: torch.arange(len(chances)) == 0,
    "the second half": lambda chances: torch.arange(len(chances)) >= len(chances) // 2,
}


@dataclass(frozen=True)
class Run:
    """A model's adapter and the steps that train it."""

    lora: dict[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    steps: int = 50
    batch: int = 3
    accumulation: int = 1
    schedule: str = "linear"
    warm_up: int = 0
    clip: float = 0.3
    lengths: tuple[int, ...] = LENGTHS
    masks: tuple[str, ...] = ("some", "all", "none", "the second half", "the last", "the first")
    left: bool = False  # padding ahead of the tokens

    def rows(self) -> list[Row]:
        generator = torch.Generator().manual_seed(1)
        made = []
        for index in range(self.steps * self.accumulation * self.batch):
            ids = torch.randint(2, VOCABULARY, (self.lengths[index % len(self.lengths)],), generator=generator)
            chances = torch.rand(len(ids), generator=generator)
            loss = MASKS[self.masks[index % len(self.masks)]](chances)
            made.append((ids.tolist(), ids.masked_fill(~loss, IGNORED).tolist()))
        return made

    def collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        side = "left" if self.left else "right"
        parts = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
        parts["attention_mask"] = [torch.ones_like(each) for each in parts["input_ids"]]
        pads = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
        batch = {name: pad_sequence(parts[name], True, pads[name], side) for name in parts}
        # No token comes before a row's first one, so none predicts it.
        batch["labels"].masked_fill_(batch["attention_mask"].cumsum(1) == 1, IGNORED)
        return batch

    def optimizer_and_schedule(self, model: Any) -> tuple[Any, Any]:
        # A training that diverges would amplify float64's rounding beyond the tolerance. So would Adam's usual eps,
        # where a gradient is zero but for rounding: in rows of two tokens, no loss depends on queries and keys.
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=8, eps=1e-4)
        return optimizer, get_scheduler(self.schedule, optimizer, self.warm_up, self.steps)


def by_trainer(model: Any, run: Run, folder: Path) -> list[float]:
    """Train by TRL's Trainer under the lean forward; return the sum of each batch's losses."""
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        max_grad_norm=run.clip,
        logging_strategy="no",
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
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in run.rows()]),
        data_collator=run.collate,
        processing_class=tokenizer(),
        optimizers=run.optimizer_and_schedule(model),
    )
    trainer.remove_callback(PrinterCallback)
    adopt(trainer, "lean")
    own, losses = LeanForward.fused_output, []

    def recorded(self: LeanForward, batch: Any) -> Any:
        output = own(self, batch)
        if self.model.training:  # not the check on the first batch
            losses.append(-output.log_probs.sum().item())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeanForward, "fused_output", recorded)
        trainer.train()
    return losses


def by_hand(model: Any, run: Run) -> list[float]:
    optimizer, schedule = run.optimizer_and_schedule(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base, rows, losses = model.get_base_model(), iter(run.rows()), []
    model.train()
    for _ in range(run.steps):
        batches = []
        for _ in range(run.accumulation):
            some = [next(rows) for _ in range(run.batch)]
            batches.append(run.collate([{"input_ids": ids, "labels": labels} for ids, labels in some]))
        tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        for batch in batches:
            hidden = base.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            logits, labels = base.get_output_embeddings()(hidden[:, :-1]), batch["labels"][:, 1:]
            chosen = labels != IGNORED
            loss = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum")
            (loss / tokens).backward()
            losses.append(loss.item())
        clip_grad_norm_(trained, run.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def check(run: Run) -> None:
    """Compare every batch's loss and the trained weights."""
    ours, reference = (adapted(run.architecture, **{"r": 3, "lora_alpha": 6, **run.lora}) for _ in range(2))

    with tempfile.TemporaryDirectory() as folder:
        losses = by_trainer(ours, run, Path(folder))
    expected = by_hand(reference, run)

    assert len(losses) == run.steps * run.accumulation
    assert losses == pytest.approx(expected, rel=1e-12)
    assert_close(
        [each.detach() for each in ours.parameters() if each.requires_grad],
        [each.detach() for each in reference.parameters() if each.requires_grad],
        1e-12,
    )


def test_fifty_steps_are_those_of_a_loop_by_hand() -> None:
    check(Run())


def test_steps_with_rows_of_two_and_of_512_tokens_are_those_of_a_loop_by_hand() -> None:
    check(Run(steps=3, lengths=(512, 2, 30), masks=("all", "all", "none", "some")))


RUNS = st.builds(
    Run,
    architecture=st.sampled_from(("llama", "qwen2", "phi")),
    lora=st.fixed_dictionaries(
        {
            "r": st.integers(1, 9),
            "lora_alpha": st.integers(1, 32),
            "use_rslora": st.booleans(),
            "target_modules": st.sampled_from(("all-linear", ["q_proj", "v_proj"], ["k_proj"])),
        }
    ),
    steps=st.just(6),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    schedule=st.sampled_from(("linear", "cosine", "constant_with_warmup", "polynomial")),
    warm_up=st.integers(0, 3),
    clip=st.sampled_from((0.05, 1.0, 1e6)),
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=7).map(tuple),
    # Every step has a label.
    masks=st.lists(st.sampled_from(sorted(MASKS)), max_size=4).map(lambda masks: ("all", *masks)),
    left=st.booleans(),
)


def test_one_rank_and_rows_of_two_tokens_are_those_of_a_loop_by_hand() -> None:
    lora = {"r": 1, "lora_alpha": 10, "target_modules": "all-linear"}
    for lengths in ((2, 16), (2,)):
        check(Run(lora=lora, architecture="qwen2", steps=6, batch=1, clip=0.05, lengths=lengths, masks=("all",)))


@settings(max_examples=4, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # a failure is not made smaller here
@given(run=RUNS)
def test_any_run_is_that_of_a_loop_by_hand(run: Run) -> None:
    check(run)


@pytest.mark.slow
@settings(max_examples=40)
@given(run=RUNS)
def test_fifty_steps_of_any_run_are_those_of_a_loop_by_hand(run: Run) -> None:
    check(replace(run, steps=50))
