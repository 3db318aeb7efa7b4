"""The peak memory of a computation that is traced without weights and results."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_aten = torch.ops.aten
# What these functions return for tensors without data. A step reads such values to check and to log them.
_VALUES: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: lambda tensor: torch.ones((), dtype=tensor.dtype).item(),
    _aten.equal.default: lambda *_: True,
}
_INTEGERS_BY_LAST_NUMBER = (_aten.arange, _aten.full)  # if no dtype is given


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block and alive at the same time.

    The model's tensors get only shapes, and pretend to be on the CPU. Integers and masks have data, because the lengths
    of rows decide the shapes of other tensors. Temporary memory inside a kernel is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._pretend = FakeTensorMode()
        self._model = model
        _replace_tensors(model, self._pretend)
        model.to = lambda *_, **__: model  # type: ignore[assignment] # Trainers move a model, which fails without data
        if isinstance(model, PeftModel):
            _replace_added(model, self._pretend)
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __enter__(self) -> LiveBytes:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._known[tensor.untyped_storage()] = None
        return super().__enter__()  # type: ignore[no-any-return]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._call(func, args, kwargs or {})
        for each in _tensors(result):
            self._count(each.untyped_storage())
        return result

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        if func is _aten._fused_sdp_choice.default:  # without data, the slow attention would always be chosen
            with _disable_current_modes():
                return func(*map(_real, args), **{name: _real(value) for name, value in kwargs.items()})
        real = sum(map(_has_data, tensors))
        if real == len(tensors):
            if tensors or _makes_integers(func, args, kwargs):
                return func(*args, **kwargs)
            with self._pretend:
                return func(*args, **kwargs)
        if func in _VALUES:
            return _VALUES[func](*args)
        if func is _aten.nonzero.default:
            return _positions(args[0])
        if func is _aten.index.Tensor:
            args = (args[0], [each for index in args[1] for each in _without_mask(index)])
        if real:
            args, kwargs = self._without_data(args), {name: self._without_data(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)

    def _without_data(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._without_data, value))
        if not isinstance(value, torch.Tensor) or not _has_data(value):
            return value
        with _disable_current_modes():
            return self._pretend.from_tensor(value)

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size


def _replace_tensors(model: nn.Module, pretend: FakeTensorMode) -> None:
    """Replace a model's tensors by tensors that pretend to be on the CPU."""
    made: dict[int, torch.Tensor] = {}

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:  # layers can share a weight
            with pretend:
                made[id(tensor)] = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        return made[id(tensor)]

    model._apply(replaced)


def _replace_added(model: PeftModel, pretend: FakeTensorMode) -> None:
    """Replace the tensors of an adapter that is added later.

    DPO and KTO add a copy of the trained adapter as their reference.
    """
    add = model.add_adapter

    def added(*args: Any, **kwargs: Any) -> None:
        add(*args, **kwargs)
        for module in model.modules():
            if all(map(_has_data, module.parameters())):
                _replace_tensors(module, pretend)

    model.add_adapter = added  # type: ignore[method-assign]


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a function's arguments or result."""
    if isinstance(values, torch.Tensor):
        yield values
    elif not isinstance(values, (str, int, float, type(None))):
        for value in values if hasattr(values, "__iter__") else ():
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from _tensors(value)


def _has_data(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor)


def _real(value: Any) -> Any:
    """Return a tensor with data and the shape of `value`; any other value is returned as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions that are not zero. Without data, all of them are chosen."""
    return mask.nonzero() if _has_data(mask) else mask.new_zeros((mask.numel(), mask.ndim), dtype=torch.long)


def _without_mask(index: Any) -> Iterable[Any]:
    """Return an index with positions in the place of a mask, whose result would have an unknown shape."""
    return _positions(index).unbind(1) if isinstance(index, torch.Tensor) and index.dtype is torch.bool else (index,)


def _makes_integers(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if a function without tensors among its arguments makes integers or a mask."""
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func.overloadpacket in _INTEGERS_BY_LAST_NUMBER and all(isinstance(each, int) for each in args[-1:])
    return not (dtype.is_floating_point or dtype.is_complex)
