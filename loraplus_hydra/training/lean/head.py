"""Log-probabilities of supervised tokens. No other logits are computed, and none are stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from loraplus_hydra.training.lean.frozen import Frozen

_PIECE = 2**20  # number of logits at a time, 4 MB in float32; more don't fit into the processor's cache
_LEAST = 128  # minimum number of rows of logits at a time; products of fewer rows are slow


class Scores(NamedTuple):
    """Log-probability, entropy and top-1 hit of each supervised token."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def score(
    hidden: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, head: Frozen, bias: torch.Tensor | None
) -> Scores:
    """Return the scores of `targets`, predicted from `hidden` at `places`.

    Shapes: targets and places [supervised], hidden [tokens, size]. Only the log-probabilities have a gradient. The
    gradient is computed piece by piece in this forward pass, and the backward pass only scales it, so a piece's logits
    are never needed again. Scores are float32, or float64 for a float64 model.
    """
    return Scores(*_Score.apply(hidden, places, targets, head, bias, torch.is_grad_enabled(), True))


def log_probabilities(
    hidden: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, head: Frozen, bias: torch.Tensor | None
) -> torch.Tensor:
    """Call `score`, and return only the log-probabilities of its result."""
    log_probs: torch.Tensor = _Score.apply(hidden, places, targets, head, bias, torch.is_grad_enabled(), False)[0]
    return log_probs


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        places: torch.Tensor,
        targets: torch.Tensor,
        head: Frozen,
        bias: torch.Tensor | None,
        with_gradient: bool,
        with_metrics: bool,
    ) -> Any:
        chosen = hidden.index_select(0, places)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            chosen, head = chosen.to(dtype), Frozen(head.weight.to(dtype))
            bias = None if bias is None else bias.to(dtype)
        gradient = torch.empty_like(chosen) if with_gradient else None
        size = max(_LEAST, _PIECE // head.weight.shape[0])
        made = []
        for at in range(0, max(len(chosen), 1), size):
            piece = slice(at, at + size)
            part = None if gradient is None else gradient[piece]
            made.append(_piece(chosen[piece], targets[piece], head, bias, part, with_metrics))
        scores = tuple(torch.cat(each) for each in zip(*made, strict=True))
        ctx.shape, ctx.dtype, ctx.gradient, ctx.places = hidden.shape, hidden.dtype, gradient, places
        ctx.mark_non_differentiable(*scores[1:])
        return scores

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor, *_: Any) -> Any:  # type: ignore[override]
        gradient = (ctx.gradient * grad_log_probs[:, None]).to(ctx.dtype)
        grad = gradient.new_zeros(ctx.shape).index_copy_(0, ctx.places, gradient)
        return grad, None, None, None, None, None, None


def _piece(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Frozen,
    bias: torch.Tensor | None,
    gradient: torch.Tensor | None,
    with_metrics: bool,
) -> tuple[torch.Tensor, ...]:
    """Return one piece's log-probabilities, entropies and hits.

    The gradient of the log-probabilities is written to `gradient`. Passes over the logits are avoided, because each
    takes a fifth of the time of the logits' product.
    """
    logits = head.forward(hidden)
    if bias is not None:
        logits += bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits.sub_(logits.amax(1, keepdim=True))
    target = targets[:, None]
    own = logits.gather(1, target)[:, 0]
    shares = logits.exp()
    total = shares.sum(1)
    log_total = total.log()
    metrics = (_hits(own, logits, targets), log_total - logits.mul_(shares).sum(1) / total) if with_metrics else ()
    if gradient is not None:
        shares.mul_((-1 / total)[:, None]).scatter_add_(1, target, torch.ones_like(total)[:, None])
        gradient.copy_(head.backward(shares.to(hidden.dtype)))
    return (own - log_total, *reversed(metrics))


def _hits(own: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return 1 if the target is the first of the largest logits (which are 0), otherwise 0."""
    hits = (own == 0).to(own.dtype)
    largest = hits.nonzero()[:, 0]
    hits[largest] = (logits[largest].max(1).indices == targets[largest]).to(own.dtype)
    return hits
