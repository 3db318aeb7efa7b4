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

    Outputs and gradients are compared, without dropout. The model's gradients and the random generators stay unchanged.
    Raises UnknownBatchError if these rows have no label.
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
    return None


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
        after_token = torch.nn.functional.pad(last[:-1], (1, 0))
        labels[-1] = torch.where((last * after_token).bool(), some["input_ids"][-1], IGNORED)
    return some


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
