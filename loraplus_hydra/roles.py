"""A model's trained tensors and their roles, by the layer that owns each and the attribute that holds it; knows
PEFT's layers.

A name's text decides nothing here: an adapter called `my_lora_B` or a target called `lora_Block` are names like any
other. Call it before anything wraps or shards the model: FSDP's flat shards have neither owner nor shape.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplus_hydra.errors import UserError
from loraplus_hydra.grouping import TensorRecord
from loraplus_hydra.peft_methods import ADALORA_ROLES, LORAPLUS_SUPPORT, ROLE_OF_ATTRIBUTE, SPLIT, zero_start

if TYPE_CHECKING:
    import torch

__all__ = ["LORAPLUS_SUPPORT", "SPLIT", "tensor_records", "trained_tensors"]

# LlamaRMSNorm, T5LayerNorm, LayerNorm2d, MambaRMSNormGated, RMS_norm; not NormHead (Baichuan's output matrix), not
# Normalize.
NORM_CLASS = re.compile(r"(layer|rms|batch|group|instance|scale)_?norm|norm_?(\dd)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the walk needs to know of a module's class; worked out once for each class."""

    owner: str
    owner_classes: tuple[str, ...]
    is_norm: bool
    is_embedding: bool
    is_tuner: bool
    is_adalora: bool
    holds_copies: bool
    """A `modules_to_save` wrapper, or LN-tuning's layer: whole copies of a module, one for each adapter."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in PEFT's structure a module stands."""

    tuner: _Kind | None = None
    """The adapted layer, inside one of its PEFT layer's attributes; None in the base model and in copies of it."""
    role: str = "other"
    per_adapter: bool = False
    """The next name below is the adapter's."""
    adapter: str | None = None
    saved: bool = False


_BASE = _Place()


def tensor_records(model: torch.nn.Module) -> list[TensorRecord]:
    """A record for each trained tensor of `model`, in the order of `named_parameters()`; one linear walk.

    Trained is what requires a gradient, so a frozen reference adapter is no part of it. Works for models without PEFT
    and on the meta device. Raises UserError for a model that FSDP has flattened.
    """
    return [record for record, _ in trained_tensors(model)]


def trained_tensors(model: torch.nn.Module) -> list[tuple[TensorRecord, torch.nn.Parameter]]:
    """As `tensor_records`, each record with its tensor, so that nobody needs to walk the model again."""
    kinds: dict[type, _Kind] = {}
    places = _Places()
    inits = _initialisations(model)
    found: list[tuple[TensorRecord, torch.nn.Parameter]] = []
    seen_modules: set[int] = set()
    seen_tensors: set[int] = set()
    stack: list[tuple[str, Any, _Place]] = [("", model, _BASE)]
    while stack:
        prefix, module, place = stack.pop()
        if id(module) in seen_modules:
            continue
        seen_modules.add(id(module))
        kind = _kind(type(module), kinds)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen_tensors:
                continue
            seen_tensors.add(id(parameter))
            if parameter.requires_grad:
                found.append((_record(prefix + name, name, parameter, kind, place, inits), parameter))
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        children.reverse()  # the stack gives back the last one first
        if kind.is_tuner or kind.holds_copies:
            adapted = _adapted(module, kinds)
            stack += [
                (f"{prefix}{name}.", child, places.below_peft_layer(module, kind, adapted, name, place))
                for name, child in children
                if child._modules or child._parameters  # most attributes of a PEFT layer are empty
            ]
        elif place.per_adapter:
            stack += [(f"{prefix}{name}.", child, places.of_adapter(place, name)) for name, child in children]
        else:
            stack += [(f"{prefix}{name}.", child, place) for name, child in children]
    return found


class _Places:
    """Makes each place once: a model has a few kinds of them, and tens of thousands of layers."""

    def __init__(self) -> None:
        self.made: dict[tuple[object, ...], _Place] = {}

    def below_peft_layer(self, layer: Any, kind: _Kind, adapted: _Kind, attribute: str, place: _Place) -> _Place:
        if attribute == "base_layer":
            return _BASE
        if attribute not in layer.adapter_layer_names and attribute not in layer.other_param_names:
            return _BASE if kind.holds_copies else place
        key = (id(kind), id(adapted), attribute)
        if key not in self.made:
            roles = ADALORA_ROLES if kind.is_adalora and attribute in ADALORA_ROLES else ROLE_OF_ATTRIBUTE
            self.made[key] = (
                _Place(saved=True, per_adapter=True)
                if kind.holds_copies
                else _Place(adapted, roles.get(attribute, "other"), per_adapter=True)
            )
        return self.made[key]

    def of_adapter(self, place: _Place, adapter: str) -> _Place:
        key = (id(place), adapter)
        if key not in self.made:
            self.made[key] = _Place(place.tuner, place.role, adapter=adapter, saved=place.saved)
        return self.made[key]


def _record(
    full_name: str, name: str, parameter: torch.nn.Parameter, kind: _Kind, place: _Place, inits: Mapping[str, object]
) -> TensorRecord:
    owner = place.tuner or kind
    # In a ParameterDict the parameter's own name is the adapter's.
    adapter = name if place.per_adapter else place.adapter
    if place.tuner is not None:
        role = "lora_B_bias" if place.role == "lora_B" and name == "bias" and not place.per_adapter else place.role
    else:
        role = _plain_role(name, kind, place)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed ZeRO-3 empties `shape`
    embedding_factor = role in ("lora_embedding_A", "lora_embedding_B", "trainable_tokens")
    embedding_weight = place.tuner is None and kind.is_embedding and name == "weight"
    return TensorRecord(
        name=full_name,
        role=role,
        owner=owner.owner,
        shape=shape,
        adapter=adapter,
        dtype=_dtype(parameter),
        trained_embedding=embedding_factor or embedding_weight,
        starts_at_zero=_starts_at_zero(role, adapter, parameter, inits),
        owner_classes=owner.owner_classes,
    )


def _plain_role(name: str, kind: _Kind, place: _Place) -> str:
    words = name.split("_")
    # `bias`, `in_proj_bias`, `bias_ih_l0`; not `relative_position_bias_table`, nor a module called `..._bias` with a
    # weight
    if words[0] == "bias" or words[-1] == "bias":
        return "bias"
    if kind.is_norm:
        return "norm"
    return "saved_module" if place.saved else "other"


def _starts_at_zero(
    role: str, adapter: str | None, parameter: torch.nn.Parameter, inits: Mapping[str, object]
) -> bool | None:
    if adapter is None or role in ("saved_module", "bias", "norm", "other"):
        return None
    initialisation = inits.get(adapter)
    if initialisation is False and role in ("lora_A", "lora_B") and not parameter.is_meta:
        return not bool(parameter.detach().any())  # only the values can tell; on the meta device there are none
    return zero_start(role, initialisation)


def _initialisations(model: torch.nn.Module) -> dict[str, object]:
    """Adapter name -> its config's `init_lora_weights` (or the field that other methods have for it)."""
    found: dict[str, object] = {}
    module: Any = model
    for _ in range(4):  # trainer wrapper, PeftModel, tuner, base model
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping):
            for adapter, config in configs.items():
                init = getattr(config, "init_lora_weights", None)
                found.setdefault(str(adapter), init if init is not None else getattr(config, "init_weights", True))
        module = getattr(module, "module", None) or getattr(module, "base_model", None)
        if module is None:
            break
    return found


def _adapted(tuner: Any, kinds: dict[type, _Kind]) -> _Kind:
    """The layer that a PEFT layer adapts, through every PEFT layer in between."""
    module = inner = tuner
    while inner is not None:
        module = inner
        inner = module._modules.get("base_layer", module._modules.get("token_adapter"))
    return _kind(type(module), kinds)


def _kind(cls: type, kinds: dict[type, _Kind]) -> _Kind:
    kind = kinds.get(cls)
    if kind is None:
        kind = kinds[cls] = _make_kind(cls)
    return kind


def _make_kind(cls: type) -> _Kind:
    import torch

    if cls.__name__ == "FullyShardedDataParallel":
        raise UserError(
            "the model is already wrapped in FSDP, whose flat shards have no roles: make the groups before wrapping it"
        )
    tuner_layer, adalora_layer, holders = _peft_classes()
    classes = [base for base in cls.__mro__ if base not in (object, torch.nn.Module)]
    names = dict.fromkeys(
        name for base in classes for name in (base.__name__, f"{base.__module__}.{base.__qualname__}")
    )
    return _Kind(
        owner=cls.__name__,
        owner_classes=tuple(names),
        is_norm=any(NORM_CLASS.search(base.__name__) for base in classes),
        is_embedding=issubclass(cls, (torch.nn.Embedding, torch.nn.EmbeddingBag)),
        is_tuner=tuner_layer is not None and issubclass(cls, tuner_layer),
        is_adalora=adalora_layer is not None and issubclass(cls, adalora_layer),
        holds_copies=bool(holders) and issubclass(cls, holders),
    )


def _peft_classes() -> tuple[type | None, type | None, tuple[type, ...]]:
    if "peft" not in sys.modules:  # then no layer of the model can be PEFT's
        return None, None, ()
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return BaseTunerLayer, AdaLoraLayer, (ModulesToSaveWrapper, LNTuningLayer)


def _dtype(parameter: torch.nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")
