"""The check, on a run's first batch, that both forwards give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loraplus_hydra.errors import first_line
from loraplus_hydra.training.lean.attention import UnknownBatchError, UnknownModelError
from loraplus_hydra.training.lean.forward import IGNORED

Entry = Callable[[Mapping[str, Any]], Any]

_ROWS = 4  # number of the batch's rows in the check; errors between rows need several rows


def disagreement(model: nn.Module, plain: Entry, lean: Entry, batch: Mapping[str, Any]) -> str | None:
    """Return the difference of two forwards on a batch's first rows; None if they agree.

    Outputs and gradients are compared, without dropout. In coarse dtypes rounding hides a small influence between rows,
    so it is also checked that no gradient flows from one row to another. The model's gradients and the random
    generators stay unchanged. Raises UnknownBatchError if these rows have no label.
    """
    some = _some_rows(batch, getattr(model.config, "pad_token_id", None))
    labels = some.get("labels")
    if labels is not None and not bool((labels != IGNORED).any()):
        raise UnknownBatchError("the first rows have no label")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _without_dropout(model), torch.enable_grad():
        try:
            output = lean(some)
            # The values that a run uses: log-probabilities, a classifier's logits, or else the loss.
            name = next((name for name in ("log_probs", "logits") if output.get(name) is not None), "loss")
            made = _numbers(output[name], trained)
            is_mixed = _mixes_rows(model, lean, some)
        except UnknownModelError as error:
            return str(error)
        except UnknownBatchError:
            raise
        # A model may raise any error for unexpected rows; an invalid batch fails again later
        except Exception as error:
            return f"it fails with joined rows: {type(error).__name__}: {first_line(error)}"
        expected = _numbers(plain(some)[name], trained)
        tolerance = _tolerance(model)
    for what, one, other in zip(("outputs", "gradients"), expected, made, strict=True):
        difference = _relative(one, other)
        if not difference <= tolerance:
            return f"the {what} differ by {difference:.1g} on the first batch"
    return "its layers mix tokens of different rows" if is_mixed else None


def _mixes_rows(model: nn.Module, lean: Entry, some: Mapping[str, Any]) -> bool:
    """Return True if the scores of the last joined row depend on the embeddings of other rows.

    A gradient between independent rows is exactly zero in every dtype.
    """
    mask = some["attention_mask"]
    lengths = mask.sum(1)
    longest = int(lengths.max())
    row = int((lengths == longest).nonzero()[-1])  # rows are joined in the order of their lengths
    alone = dict(some)
    if (labels := some.get("labels")) is not None and labels.shape == mask.shape:
        alone["labels"] = torch.full_like(labels, IGNORED)
        # All tokens, because a layer may mix only the first ones
        alone["labels"][row] = _all_labels(some["input_ids"][row], mask[row])
    with _embeddings(model) as embedded:
        output = lean(alone)
    value = output["logits"][row] if output.get("logits") is not None else output["loss"]
    (own,) = embedded
    (gradient,) = torch.autograd.grad(value.float().sum(), own)
    others = gradient[0, :-longest]
    return bool((others.isfinite() & (others != 0)).any())  # zero times infinity is not finite


@contextmanager
def _embeddings(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of the model's input embedding, as the start of the graph of gradients."""
    found: list[torch.Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # models may change it in place

    hook = model.get_input_embeddings().register_forward_hook(collect)
    try:
        yield found
    finally:
        hook.remove()


def _tolerance(model: nn.Module) -> float:
    """Return the relative difference that rounding to the coarsest used dtype can cause."""
    parameters = list(model.parameters())
    dtypes = {each.dtype for each in parameters if each.is_floating_point()}
    device = parameters[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return 1e-4 if dtypes <= {torch.float32, torch.float64} else 5e-2


def _numbers(output: torch.Tensor, trained: list[nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs, and the gradients of a weighted sum of the outputs, as vectors."""
    values = output.flatten()
    # A weighted sum, because a plain sum may be constant.
    mixture = (values * torch.arange(values.numel(), device=values.device).cos()).sum()
    gradients: Any = ()
    if mixture.requires_grad:
        gradients = torch.autograd.grad(mixture, trained, allow_unused=True, materialize_grads=True)
    return _vector([values]), _vector(gradients)


def _vector(tensors: Any) -> torch.Tensor:
    parts = [each.detach().flatten().to(torch.float64) for each in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


def _relative(expected: torch.Tensor, made: torch.Tensor) -> float:
    """Return the relative size of a difference. Places that are not finite must agree."""
    finite = expected.isfinite()
    if not torch.equal(finite, made.isfinite()):
        return float("inf")
    expected, made = expected[finite], made[finite]
    size = expected.norm()
    return float((made - expected).norm() / size) if size > 0 else float((made - expected).norm())


def _some_rows(batch: Mapping[str, Any], pad_token_id: int | None) -> dict[str, Any]:
    """Return a batch's first rows, and a shortened copy of the longest row.

    In the copy, a third of the tokens are masked, and the others have loss. So there are always two rows of different
    lengths, and errors from mixed rows or counted padding are found.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    longest = int(mask.sum(1).argmax())
    chosen = torch.tensor([*range(min(len(ids), _ROWS)), longest], device=ids.device)
    batch = {**batch, "attention_mask": mask}
    some = {name: value[chosen] if _is_by_row(value, len(ids)) else value for name, value in batch.items()}
    last, count = some["attention_mask"][-1], mask[longest].cumsum(0)
    kept = (2 * count[-1] // 3).clamp(min=1)
    # The mask is on the side of the batch's padding.
    last *= (count > count[-1] - kept) if is_padded_ahead(batch) else (count <= kept)
    if pad_token_id is not None:  # classifiers that are decoders look for it
        some["input_ids"][-1].masked_fill_(last == 0, pad_token_id)
    if (labels := some.get("labels")) is not None and labels.shape == some["input_ids"].shape:
        labels[-1] = _all_labels(some["input_ids"][-1], last)
    return some


def _all_labels(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the labels of a row in which each token after another has loss."""
    after_token = torch.nn.functional.pad(mask[:-1], (1, 0))
    return torch.where((mask * after_token).bool(), ids, IGNORED)


def is_padded_ahead(batch: Mapping[str, Any]) -> bool:
    """Return True if padding comes before a row's tokens."""
    mask = batch.get("attention_mask")
    return mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any())


def _is_by_row(value: Any, size: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == size


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        model.train(was_training)
