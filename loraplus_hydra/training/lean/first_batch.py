"""The check on a run's first batch: the lean forward and the model's own give the same numbers."""

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

_ROWS = 4  # of the batch: enough for one row to disturb another


def disagreement(model: nn.Module, plain: Entry, lean: Entry, batch: Mapping[str, Any]) -> str | None:
    """Return how two forwards differ on the first rows of a batch, in outputs or gradients.

    None if they agree.

    Dropout is off. Neither gradients nor random generators are changed. Raises UnknownBatchError if these rows show
    nothing.
    """
    size = len(batch["input_ids"])
    some = {name: value[:_ROWS] if _is_by_row(value, size) else value for name, value in batch.items()}
    labels = some.get("labels")
    if labels is not None and not bool((labels != IGNORED).any()):
        raise UnknownBatchError("the first rows have no label")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _without_dropout(model), torch.enable_grad():
        try:
            made = _numbers(lean(some), some, trained)
        except UnknownModelError as error:
            return str(error)
        except UnknownBatchError:
            raise
        except Exception as error:  # whatever a model makes of rows that it doesn't expect; a wrong batch fails again
            return f"it fails with joined rows: {type(error).__name__}: {first_line(error)}"
        expected = _numbers(plain(some), some, trained)
        tolerance = _tolerance(model)
    for what, one, other in zip(("outputs", "gradients"), expected, made, strict=True):
        difference = _relative(one, other)
        if not difference <= tolerance:
            return f"its {what} differ by {difference:.1g} on the first batch"
    return None


def _tolerance(model: nn.Module) -> float:
    """Return the relative difference that the coarsest dtype in use explains."""
    parameters = list(model.parameters())
    dtypes = {each.dtype for each in parameters if each.is_floating_point()}
    device = parameters[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return 1e-4 if dtypes <= {torch.float32, torch.float64} else 5e-2


def _numbers(output: Any, batch: Mapping[str, Any], trained: list[nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and the gradients of a mixture of them, each as one vector."""
    values = _outputs(output, batch)
    # Weights, since a layer norm at the end makes their plain sum a constant.
    mixed = [each * torch.arange(each.numel(), device=each.device).cos() for each in values]
    mixture = torch.stack([each.sum() for each in mixed]).sum()
    gradients: Any = ()
    if mixture.requires_grad:
        gradients = torch.autograd.grad(mixture, trained, allow_unused=True, materialize_grads=True)
    return _vector(values), _vector(gradients)


def _outputs(output: Any, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that a run goes by: log-probabilities, hidden states of tokens, or a loss."""
    if (log_probs := output.get("log_probs")) is not None:
        return [log_probs.flatten()]
    if (hidden := output.get("last_hidden_state")) is not None:
        mask = batch.get("attention_mask")
        of_tokens = hidden if mask is None else hidden[mask.bool()]
        pooled = output.get("pooler_output")
        return [of_tokens.flatten(), *([] if pooled is None else [pooled.flatten()])]
    return [output["loss"].reshape(1)]


def _vector(tensors: Any) -> torch.Tensor:
    parts = [each.detach().flatten().to(torch.float64) for each in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


def _relative(expected: torch.Tensor, made: torch.Tensor) -> float:
    """Return the size of a difference beside what is expected; places that are not finite have to agree."""
    finite = expected.isfinite()
    if not torch.equal(finite, made.isfinite()):
        return float("inf")
    expected, made = expected[finite], made[finite]
    size = expected.norm()
    return float((made - expected).norm() / size) if size > 0 else float((made - expected).norm())


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
