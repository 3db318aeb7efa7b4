"""The check on the first batch: it finds a model that is different, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loraplus_hydra.training.lean.attention import UnknownBatchError
from loraplus_hydra.training.lean.first_batch import _mixes_rows, _some_rows, disagreement
from loraplus_hydra.training.lean.forward import LeanForward
from tests.support.lean import GPT2, Batch, adapted
from tests.training.lean.test_architectures import EXPERTS, GROUPED
from tests.training.lean.test_architectures import adapted as of_settings


def checked(model: Any, batch: dict[str, torch.Tensor], spoil: Any = None) -> str | None:
    base = model.get_base_model()
    lean = LeanForward(base)
    if spoil is not None:
        spoil(base)
    return disagreement(base, lambda some: base(**some), lean.causal_output, batch)


class BiasedAttention(nn.Module):
    """Adds to the hidden states what depends on their neighbours, as attention with a bias of its own does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        out, weights = self.inner(hidden_states=hidden_states, **kwargs)
        return out + 0.01 * hidden_states.cumsum(1), weights


def test_an_attention_with_a_part_that_the_interface_does_not_show_is_found() -> None:
    model = adapted("llama", dtype=torch.float32)
    layer = model.get_base_model().model.layers[1]
    layer.self_attn = BiasedAttention(layer.self_attn)

    reason = checked(model, Batch((5, 9, 7)).tensors())

    assert reason is not None
    assert "differ by" in reason


def test_a_model_whose_logits_are_scaled_is_found() -> None:
    def scale(base: Any) -> None:
        own = base.lm_head.forward
        base.lm_head.forward = lambda hidden: own(hidden) * 1.01

    assert "differ by" in str(checked(adapted("llama"), Batch((5, 9)).tensors(), scale))


def test_a_wrong_gradient_alone_is_found() -> None:
    base = adapted("llama").get_base_model()
    lean = LeanForward(base)

    def with_other_gradient(some: Any) -> Any:
        output = lean.causal_output(some)
        output["loss"] = output.loss.detach() + 1.01 * (output.loss - output.loss.detach())
        return output

    reason = disagreement(base, lambda some: base(**some), with_other_gradient, Batch((5, 9)).tensors())
    assert "gradients differ by" in str(reason)


def test_a_model_that_fails_on_joined_rows_is_found() -> None:
    model = adapted("llama")

    def fail_on_joined(base: Any) -> None:
        def check(module: Any, inputs: Any, kwargs: Any) -> None:
            if kwargs.get("position_ids") is not None and kwargs["position_ids"].shape[-1] > 9:
                raise TypeError("no such rows")

        base.model.layers[0].register_forward_pre_hook(check, with_kwargs=True)

    reason = checked(model, Batch((5, 9)).tensors(), fail_on_joined)

    assert reason == "it fails with joined rows: TypeError: no such rows"


def test_agreement_leaves_no_trace() -> None:
    model = adapted("llama", lora_dropout=0.3, dtype=torch.float32).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()

    with torch.no_grad():
        assert checked(model, Batch((5, 9)).tensors()) is None

    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_not_finite_numbers_have_to_agree() -> None:
    model = adapted("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[5] = float("nan")
    batch = Batch((5, 9)).tensors()
    batch["input_ids"][0, 2] = 5

    assert checked(model, batch) is None


def test_rows_without_a_label_are_compared_all_the_same() -> None:
    def scale(base: Any) -> None:
        own = base.lm_head.forward
        base.lm_head.forward = lambda hidden: own(hidden) * 1.01

    unlabelled = Batch((5, 9), supervised=0.0).tensors()

    assert checked(adapted("llama"), unlabelled) is None
    assert "differ by" in str(checked(adapted("llama"), unlabelled, scale))


def test_rows_of_one_token_decide_nothing() -> None:
    with pytest.raises(UnknownBatchError):
        checked(adapted("llama"), Batch((1, 1)).tensors())


def test_one_row_alone_shows_a_model_that_mixes_rows() -> None:
    model = adapted("llama", dtype=torch.float32)
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *given: given[2] + given[2].roll(1, 1))

    assert "differ by" in str(checked(model, Batch((9,)).tensors()))


@pytest.mark.parametrize("left", [False, True])
def test_the_row_that_is_added_is_padded_on_the_batch_s_side(left: bool) -> None:
    some = _some_rows(Batch((5, 9, 7), left=left).tensors(), 0)

    mask = some["attention_mask"][-1]
    assert torch.equal(some["input_ids"][-1], some["input_ids"][1] * mask)
    assert some["attention_mask"][-1].tolist() == ([0] * 3 + [1] * 6 if left else [1] * 6 + [0] * 3)
    assert (some["labels"][-1] != -100).tolist() == [
        each > (3 if left else 0) and each < (9 if left else 6) for each in range(9)
    ]


SHORT = {**GROUPED, "block_ff_dim": 24}
MIXING = [
    ("lfm2", {**SHORT, "layer_types": ["conv", "full_attention"]}),
    ("lfm2", {**SHORT, "layer_types": ["full_attention", "conv"]}),
    ("lfm2_moe", {**GROUPED, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("architecture", "settings"), MIXING)
def test_rows_that_meet_in_a_convolution_are_found_in_every_dtype(
    architecture: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = of_settings(architecture, settings, 0).to(dtype)

    reasons = [checked(model, Batch(each).tensors()) for each in ((9,), (5, 9, 7), (8, 8))]

    assert all(reason and ("differ by" in reason or "mix tokens" in reason) for reason in reasons)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("llama", GROUPED), ("gpt2", GPT2), ("gemma3_text", GROUPED), ("mixtral", {**GROUPED, **EXPERTS})],
)
def test_rows_that_do_not_meet_are_found_independent_in_every_dtype(
    architecture: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = of_settings(architecture, settings, 0).to(dtype)

    for each in ((9,), (5, 9, 7), (8, 8)):
        assert not mixes(model.get_base_model(), Batch(each).tensors())


@pytest.mark.parametrize("fused", [False, True])
def test_a_small_influence_between_rows_is_found_in_bfloat16(fused: bool) -> None:
    model = adapted("llama", dtype=torch.bfloat16)
    model.get_base_model().model.layers[1].mlp.register_forward_hook(
        lambda *given: given[2] + 1e-3 * given[2].roll(1, 1)
    )
    base = model.get_base_model()
    lean = LeanForward(base)
    entry = lean.fused_output if fused else lean.causal_output

    assert _mixes_rows(base, entry, _some_rows(Batch((5, 9)).tensors(), 0))


@pytest.mark.parametrize("mixed", [False, True])
def test_an_influence_between_a_classifier_s_rows_is_found_in_bfloat16(mixed: bool) -> None:
    model = adapted("roberta", classes=3, dtype=torch.bfloat16)
    base = model.get_base_model()
    plain = base.forward
    lean = LeanForward(base)
    if mixed:
        base.roberta.encoder.layer[0].register_forward_hook(lambda *given: given[2] + 1e-3 * given[2].roll(1, 1))
    batch = Batch((5, 9, 7), pad=1).tensors()
    batch["labels"] = torch.tensor([0, 1, 2])

    assert _mixes_rows(base, lambda some: lean.classified(plain, some), _some_rows(batch, 1)) is mixed


def mixes(base: Any, batch: dict[str, torch.Tensor]) -> bool:
    return _mixes_rows(base, LeanForward(base).causal_output, _some_rows(batch, 0))
