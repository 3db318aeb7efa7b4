"""The lean forward of whole models, against rows run one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus_hydra.training.lean.attention import UnknownBatchError, UnknownModelError
from loraplus_hydra.training.lean.forward import FUSED, LeanForward, batch_of
from tests.support.lean import (
    BATCHES,
    CAUSAL,
    CLASSIFIERS,
    VOCABULARY,
    Batch,
    adapted,
    assert_close,
    by_hand,
    gradients,
)

TARGETS = {
    "llama": ("all-linear", ["q_proj", "v_proj"], ["k_proj", "down_proj"]),
    "qwen2": ("all-linear", ["o_proj"]),
    "phi": ("all-linear", ["q_proj", "fc2"]),
    "opt": ("all-linear", ["fc1"]),
    "gpt2": (["c_attn"], ["c_attn", "c_fc", "c_proj"]),
}


def spread_over(scored: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(scored.shape).masked_scatter(scored, values)


def check_causal(architecture: str, batch: dict[str, torch.Tensor], items: int | None = None, **lora: Any) -> None:
    """Compare the lean scores, loss and gradients with those of rows run one by one."""
    model = adapted(architecture, **lora).get_base_model()
    lean = LeanForward(model)
    expected = by_hand(model, batch)
    count = max(len(expected[0]), 1) if items is None else items
    expected_gradients = gradients(-expected[0].sum() / count, model)

    output = lean.fused_output({**batch, "num_items_in_batch": items})

    scored = batch["labels"][:, 1:] != -100
    assert torch.equal(output.label_mask, scored)
    assert_close(
        [output.log_probs, output.entropy, output.is_top1, output.loss],
        [*(spread_over(scored, each) for each in expected), -expected[0].sum() / count],
    )
    assert_close(gradients(output.loss, model), expected_gradients)


@settings(max_examples=40)
@given(
    architecture=st.sampled_from(sorted(CAUSAL)),
    batch=BATCHES,
    rank=st.integers(1, 6),
    alpha=st.integers(1, 32),
    rslora=st.booleans(),
    dora=st.booleans(),
    items=st.sampled_from((None, 7)),
    data=st.data(),
)
def test_scores_loss_and_gradients_are_those_of_rows_run_one_by_one(
    architecture: str,
    batch: Batch,
    rank: int,
    alpha: int,
    rslora: bool,
    dora: bool,
    items: int | None,
    data: st.DataObject,
) -> None:
    targets = data.draw(st.sampled_from(TARGETS[architecture]))
    fan_in_fan_out = architecture == "gpt2"
    check_causal(
        architecture,
        batch.tensors(),
        items,
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=targets,
        fan_in_fan_out=fan_in_fan_out,
    )


@pytest.mark.parametrize("lengths", [(512, 2), (2,), (2, 2, 2), (511, 512, 2, 100)])
def test_long_and_short_rows(lengths: tuple[int, ...]) -> None:
    check_causal("llama", Batch(lengths).tensors())


def test_a_row_and_a_whole_batch_without_a_label() -> None:
    batch = Batch((5, 9, 3)).tensors()
    batch["labels"][1] = -100
    check_causal("llama", batch)
    batch["labels"].fill_(-100)
    check_causal("llama", batch)


def test_lora_on_embeddings_runs_on_its_own_layer() -> None:
    check_causal("llama", Batch((5, 9)).tensors(), target_modules=["q_proj", "embed_tokens"])


@pytest.mark.parametrize("left", [False, True])
def test_the_loss_is_the_model_s_own_wherever_the_padding_is(left: bool) -> None:
    model = adapted("llama", dtype=torch.float32).get_base_model()
    batch = Batch((4, 7, 11), left=left).tensors()
    expected = model(**batch).loss

    output = LeanForward(model).causal_output(batch)

    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)


def test_a_loss_over_no_label_is_nan_as_the_model_s_own() -> None:
    model = adapted("llama", dtype=torch.float32).get_base_model()
    batch = Batch((4, 7), supervised=0.0).tensors()

    assert model(**batch).loss.isnan()
    assert LeanForward(model).causal_output(batch).loss.isnan()


@settings(max_examples=25)
@given(architecture=st.sampled_from(sorted(CLASSIFIERS)), batch=BATCHES)
def test_logits_of_a_classifier_are_the_model_s_own(architecture: str, batch: Batch) -> None:
    model = adapted(architecture, classes=3, **({"target_modules": ["c_attn"]} if architecture == "gpt2" else {}))
    base = model.get_base_model()
    tensors = Batch(**{**vars(batch), "pad": base.config.pad_token_id}).tensors()
    del tensors["labels"]
    if architecture == "bert":
        tensors["token_type_ids"] = tensors["input_ids"] % 2
    own = base(**tensors)

    made = LeanForward(base).classified(base.forward, tensors)

    assert_close([made.logits], [own.logits])
    assert_close(gradients(made.logits.cos().sum(), base), gradients(own.logits.cos().sum(), base))


def test_the_model_is_as_before_after_a_lean_pass_and_after_an_error() -> None:
    model = adapted("llama").get_base_model()
    batch = Batch((4, 7)).tensors()
    before = model(**batch).logits
    lean = LeanForward(model)

    lean.fused_output(batch)
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(IndexError):
        lean.fused_output({**batch, "input_ids": batch["input_ids"] + VOCABULARY})
    assert torch.equal(model(**batch).logits, before)


def test_a_label_behind_a_masked_token_is_for_the_model_s_own_forward() -> None:
    batch = Batch((4, 7), supervised=1.0).tensors()
    batch["attention_mask"][1, 3] = 0

    with pytest.raises(UnknownBatchError, match="masked"):
        LeanForward(adapted("llama").get_base_model()).fused_output(batch)


def test_an_empty_row_is_for_the_model_s_own_forward() -> None:
    batch = Batch((4, 7)).tensors()
    batch["attention_mask"][0] = 0

    with pytest.raises(UnknownBatchError, match="empty"):
        LeanForward(adapted("llama").get_base_model()).fused_output(batch)


def test_a_pooler_that_is_handed_one_token_is_unknown() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    model = AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, intermediate_size=24, num_attention_heads=2
        )
    )

    batch = Batch((4, 7)).tensors()
    del batch["labels"]

    with pytest.raises(UnknownModelError, match="pooler"):
        LeanForward(model).classified(model.forward, batch)


def test_a_call_with_unknown_arguments_is_none_of_ours() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)

    assert batch_of((ids,), {}) == {"input_ids": ids}
    batch_of((), {"input_ids": ids, "past_key_values": None, "output_attentions": False, FUSED: True})
    for name in ("past_key_values", "position_ids", "inputs_embeds", "output_attentions"):
        with pytest.raises(UnknownBatchError, match=f"called with {name}"):
            batch_of((), {"input_ids": ids, name: ids})
    for args in ((), (ids, ids), (ids[0],)):
        with pytest.raises(UnknownBatchError):
            batch_of(args, {})
