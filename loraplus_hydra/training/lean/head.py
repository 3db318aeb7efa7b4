"""Log-probabilities of the supervised tokens, without logits for the others and without keeping any."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from loraplus_hydra.training.lean.frozen import Frozen

_PIECE = 2**22  # logits at a time, 16 MB in float32


class Scores(NamedTuple):
    """Of each supervised token: log-probability, entropy of its distribution, and 1 if it is the most likely one."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def score(
    hidden: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, head: Frozen, bias: torch.Tensor | None
) -> Scores:
    """Return the scores of `targets` [supervised], predicted from `hidden` [tokens, size] at `places` [supervised].

    Only the log-probabilities have a gradient. It is made piece by piece in this forward pass, so that the backward
    pass only scales it: a piece's logits are never needed again. Scores are float32, or float64 with such a model.
    """
    return Scores(*_Score.apply(hidden, places, targets, head, bias, torch.is_grad_enabled()))


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
    ) -> Any:
        chosen = hidden.index_select(0, places)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            chosen, head, bias = (
                chosen.to(dtype),
                Frozen(head.weight.to(dtype)),
                None if bias is None else bias.to(dtype),
            )
        gradient = torch.empty_like(chosen) if with_gradient else None
        size = max(16, _PIECE // head.weight.shape[0])
        made = [
            _piece(chosen[at : at + size], targets[at : at + size], head, bias, gradient, at)
            for at in range(0, max(len(chosen), 1), size)
        ]
        log_probs, entropy, is_top1 = (torch.cat(each) for each in zip(*made, strict=True))
        ctx.shape, ctx.dtype, ctx.gradient, ctx.places = hidden.shape, hidden.dtype, gradient, places
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor, *_: Any) -> Any:  # type: ignore[override]
        gradient = (ctx.gradient * grad_log_probs[:, None]).to(ctx.dtype)
        grad = gradient.new_zeros(ctx.shape).index_copy_(0, ctx.places, gradient)
        return grad, None, None, None, None, None


def _piece(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Frozen,
    bias: torch.Tensor | None,
    gradient: torch.Tensor | None,
    at: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scores of one piece, and write the gradient of its log-probabilities into `gradient` from row `at`."""
    logits = head.forward(hidden)
    if bias is not None:
        logits += bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, top = logits.max(1)
    logits.sub_(largest[:, None])
    target = targets[:, None]
    own = logits.gather(1, target)[:, 0]
    shares = logits.exp()
    total = shares.sum(1)
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(shares, logits) / total
    if gradient is not None:
        shares.mul_((-1 / total)[:, None]).scatter_add_(1, target, torch.ones_like(total)[:, None])
        gradient[at : at + len(hidden)] = head.backward(shares.to(hidden.dtype))
    return own - log_total, entropy, (top == targets).to(own.dtype)
