"""Scores of the supervised tokens: log-probabilities with their gradient, entropies and hits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraplus_hydra.training.lean import head
from loraplus_hydra.training.lean.frozen import Frozen
from loraplus_hydra.training.lean.head import log_probabilities, score
from tests.support.lean import assert_close


@given(
    tokens=st.integers(1, 30),
    supervised=st.integers(0, 30),
    size=st.integers(1, 9),
    with_bias=st.booleans(),
    piece=st.integers(1, 40),
)
def test_scores_and_gradient_are_those_of_all_logits(
    tokens: int, supervised: int, size: int, with_bias: bool, piece: int
) -> None:
    torch.manual_seed(tokens * 31 + supervised)
    hidden = torch.randn(tokens, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, size, dtype=torch.float64)
    bias = torch.randn(11, dtype=torch.float64) if with_bias else None
    places = torch.randperm(tokens)[: min(supervised, tokens)]
    targets = torch.randint(0, 11, (len(places),))
    weights = torch.randn(len(places), dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_PIECE", piece)
        patch.setattr(head, "_LEAST", 1)
        scores = score(hidden, places, targets, Frozen(weight), bias)
        alone = log_probabilities(hidden, places, targets, Frozen(weight), bias)
    (made,) = torch.autograd.grad((scores.log_probs * weights).sum(), hidden)

    logits = hidden[places] @ weight.T + (0 if bias is None else bias)
    log_shares = logits.log_softmax(1)
    log_probs = log_shares.gather(1, targets[:, None])[:, 0]
    (expected,) = torch.autograd.grad((log_probs * weights).sum(), hidden)
    entropy = -(log_shares.exp() * log_shares).sum(1)
    hits = (logits.argmax(1) == targets).double()
    assert_close([*scores, made], [log_probs, entropy, hits, expected])
    assert torch.equal(alone, scores.log_probs)


def test_of_equal_logits_the_first_one_is_the_hit() -> None:
    """As TRL counts them; in bfloat16 equal logits are no rarity."""
    hidden, weight = torch.ones(3, 2), torch.ones(5, 2)

    scores = score(hidden, torch.arange(3), torch.tensor([0, 1, 4]), Frozen(weight), None)

    assert scores.is_top1.tolist() == [1.0, 0.0, 0.0]


def test_a_nan_spoils_its_own_token_alone() -> None:
    hidden = torch.randn(3, 2)
    hidden[1] = float("nan")
    hidden.requires_grad_()

    scores = score(hidden, torch.arange(3), torch.tensor([0, 1, 1]), Frozen(torch.randn(5, 2)), None)
    (gradient,) = torch.autograd.grad(scores.log_probs.sum(), hidden)

    assert scores.log_probs.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_without_gradients_none_is_made() -> None:
    hidden = torch.randn(3, 2, requires_grad=True)

    with torch.no_grad():
        scores = score(hidden, torch.arange(3), torch.zeros(3, dtype=torch.long), Frozen(torch.randn(5, 2)), None)

    assert not scores.log_probs.requires_grad


def test_half_precision_is_summed_in_float32() -> None:
    hidden = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(300, 8, dtype=torch.bfloat16)
    targets = torch.arange(4)

    scores = score(hidden, torch.arange(4), targets, Frozen(weight), None)
    (gradient,) = torch.autograd.grad(scores.log_probs.sum(), hidden)

    logits = (hidden @ weight.T).float()
    assert gradient.dtype == torch.bfloat16
    assert_close([scores.log_probs], [logits.log_softmax(1).gather(1, targets[:, None])[:, 0]], 1e-6)
