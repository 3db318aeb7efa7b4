"""A model's trained tensors and their roles.

A role is decided by the PEFT layer that owns the tensor and by the layer's attribute, never by a name: an adapter may
be called `my_lora_B`, a target `lora_Block`. Find the roles before the model is wrapped or sharded, because FSDP's flat
shards have neither owner nor shape.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from loraplus_hydra.errors import UserError
from loraplus_hydra.loraplus.peft_layers import (
    FACTORS,
    LAYER_ROLES,
    ROLE_OF_ATTRIBUTE,
    noted_initialisations,
    zero_start,
)
from loraplus_hydra.loraplus.rules import TensorRecord

# LlamaRMSNorm, T5LayerNorm, LayerNorm2d, MambaRMSNormGated, RMS_norm; not NormHead (Baichuan's output matrix), not
# Normalize.
NORM_CLASS = re.compile(r"(layer|rms|batch|group|instance|scale)_?norm|norm_?(\dd)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """Properties of a module's class, computed once for each class."""

    owner: str
    owner_classes: tuple[str, ...]
    is_norm: bool
    is_embedding: bool
    is_peft_layer: bool
    holds_copies: bool
    """True for a `modules_to_save` wrapper or LN-tuning's layer, which have a copy of a module for each adapter."""
    adapter_attributes: frozenset[str]
    """The attributes of a PEFT layer that are dictionaries with an entry for each adapter."""
    roles: Mapping[str, str]
    """Attribute of a PEFT layer -> role."""


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A module's place in PEFT's structure."""

    tuner: _Kind | None = None
    """The adapted layer, if the module is inside a PEFT layer's attribute; None in the base model and its copies."""
    role: str = "other"
    per_adapter: bool = False
    """True if the child's name is the adapter's name."""
    adapter: str | None = None
    saved: bool = False


_BASE = _Place()
# Attributes of PEFT's layers that never contain a tensor. Skipping them saves a container and a module per layer.
_DROPOUTS = frozenset({"lora_dropout", "vera_dropout"})
_MARK = "in_new_head"  # attribute of a layer; PEFT copies it with the layer


def mark_new_head(head: torch.nn.Module) -> None:
    """Mark a classification head that is trained from a random start.

    Call this before PEFT wraps the model. Then the rules of a preset can give the head a rate of its own.
    """
    for layer in head.modules():
        setattr(layer, _MARK, True)


def tensor_records(model: torch.nn.Module) -> list[TensorRecord]:
    """Return a record for each trained tensor of `model`, in the order of `named_parameters()`.

    A tensor is trained if it requires a gradient, so a frozen reference adapter is omitted. The model may be without
    PEFT, or on the meta device. Takes one pass over the modules. Raises UserError if FSDP has flattened the model.
    """
    return trained_tensors(model)[0]


def trained_tensors(model: torch.nn.Module) -> tuple[list[TensorRecord], dict[str, torch.nn.Parameter]]:
    """Return the records of `tensor_records`, and each record's parameter by name."""
    records: list[TensorRecord] = []
    parameters: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()  # ids of `parameters`; a tensor with several names is collected once, under the first name
    # A model has many layers of few kinds, so each of these is computed once per kind.
    kind_of, place_below = cache(_kind), cache(_place_below)
    pattern_of = cache(partial(_pattern, _initialisations(model)))

    def collect(prefix: str, module: Any, place: _Place) -> None:
        """Collect a module's own trained tensors; `prefix` is the module's name."""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[prefix + name] = parameter
                pattern = pattern_of(name, parameter.dtype, kind_of(module.__class__), place)
                record = _record(prefix + name, parameter, pattern)
                records.append(record._replace(new_head=True) if _MARK in module.__dict__ else record)

    def visit(prefix: str, module: Any, place: _Place) -> None:
        """Collect a module's own tensors, then its children's.

        A large mixture of experts has half a million modules, and most are empty or frozen. So `_parameters` and
        `_modules` are read directly, because torch's iterators pass each tensor through one generator per level. A
        frozen layer is skipped before its name is built.
        """
        if module._parameters:
            collect(prefix, module, place)
        kind = kind_of(module.__class__)
        adapted = kind_of(_adapted_class(module)) if kind.is_peft_layer else None
        skipped = _DROPOUTS if kind.is_peft_layer else ()
        for name, child in module._modules.items():
            if child is None or name in skipped:
                continue
            if child._modules:
                visit(f"{prefix}{name}.", child, place_below(place, kind, adapted, name))
                continue
            for parameter in child._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    collect(f"{prefix}{name}.", child, place_below(place, kind, adapted, name))
                    break

    visit("", model, _BASE)
    return records, parameters


def _place_below(place: _Place, kind: _Kind, adapted: _Kind | None, name: str) -> _Place:
    """Return the place of the child `name`. Its parent has this `kind` and `place`."""
    if not kind.is_peft_layer:
        return _Place(place.tuner, place.role, adapter=name, saved=place.saved) if place.per_adapter else place
    if name == "base_layer":
        return _BASE
    if name not in kind.adapter_attributes:
        return _BASE if kind.holds_copies else place
    if kind.holds_copies:
        return _Place(saved=True, per_adapter=True)
    return _Place(adapted, kind.roles.get(name, "other"), per_adapter=True)


def _record(name: str, parameter: torch.nn.Parameter, pattern: TensorRecord) -> TensorRecord:
    """Return a tensor's record: `pattern` with the tensor's own name, shape and start."""
    _, role, owner, _, adapter, dtype, trained_embedding, starts_at_zero, owner_classes, _ = pattern
    if starts_at_zero is None and role in FACTORS and not parameter.is_meta:
        starts_at_zero = not bool(parameter.detach().any())  # unknown from the config, so the values decide
    shape = tuple(parameter.shape)
    if shape == (0,):  # DeepSpeed ZeRO-3 has moved the values and stores the shape in `ds_shape`
        shape = tuple(getattr(parameter, "ds_shape", shape))
    return TensorRecord(name, role, owner, shape, adapter, dtype, trained_embedding, starts_at_zero, owner_classes)


def _pattern(inits: Mapping[str, object], name: str, dtype: torch.dtype, kind: _Kind, place: _Place) -> TensorRecord:
    """Return the part of a record that all layers of one kind share.

    It is computed once per kind of layer, because a model has many layers of few kinds.
    """
    owner = place.tuner or kind
    # In a ParameterDict the parameter's name is the adapter's name.
    adapter = name if place.per_adapter else place.adapter
    if place.tuner is None:
        role = _plain_role(name, kind, place)
    elif place.role == "lora_B" and name == "bias" and not place.per_adapter:
        role = "lora_B_bias"
    else:
        role = place.role
    embedding_factor = role in ("lora_embedding_A", "lora_embedding_B", "trainable_tokens")
    embedding_weight = place.tuner is None and kind.is_embedding and name == "weight"
    return TensorRecord(
        name="",
        role=role,
        owner=owner.owner,
        shape=(),
        adapter=adapter,
        dtype=str(dtype).removeprefix("torch."),
        trained_embedding=embedding_factor or embedding_weight,
        starts_at_zero=None if adapter is None else zero_start(role, inits.get(adapter)),
        owner_classes=owner.owner_classes,
    )


def _plain_role(name: str, kind: _Kind, place: _Place) -> str:
    words = name.split("_")
    # Biases are `bias`, `in_proj_bias` and `bias_ih_l0`, but neither `relative_position_bias_table` nor a module called
    # `..._bias` with a weight.
    if words[0] == "bias" or words[-1] == "bias":
        return "bias"
    if kind.is_norm:
        return "norm"
    return "saved_module" if place.saved else "other"


def _initialisations(model: torch.nn.Module) -> dict[str, object]:
    """Return each adapter's initialisation: the stored one, or else the config's `init_lora_weights`."""
    found: dict[str, object] = {}
    module: Any = model
    for _ in range(4):  # trainer wrapper, PeftModel, tuner, base model
        for adapter, start in noted_initialisations(module).items():
            found.setdefault(adapter, start)
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping):
            for adapter, config in configs.items():
                init = getattr(config, "init_lora_weights", None)
                found.setdefault(str(adapter), init if init is not None else getattr(config, "init_weights", True))
        module = getattr(module, "module", None) or getattr(module, "base_model", None)
        if module is None:
            break
    return found


def _adapted_class(layer: Any) -> type:
    """Return the class of the layer below one or several stacked PEFT layers."""
    module = inner = layer
    while inner is not None:
        module = inner
        inner = module._modules.get("base_layer", module._modules.get("token_adapter"))
    return type(module)


def _kind(cls: type) -> _Kind:
    if cls.__name__ == "FullyShardedDataParallel":
        raise UserError(
            "the model is already wrapped in FSDP, and its flat shards have no roles: make the groups before wrapping "
            "the model"
        )
    tuner_layers, holders = _peft_classes()
    is_peft_layer = issubclass(cls, (*tuner_layers, *holders))
    classes = [base for base in cls.__mro__ if base not in (object, torch.nn.Module)]
    names = dict.fromkeys(
        name for base in classes for name in (base.__name__, f"{base.__module__}.{base.__qualname__}")
    )
    attributes = (*cls.adapter_layer_names, *cls.other_param_names) if is_peft_layer else ()  # type: ignore[attr-defined]
    return _Kind(
        owner=cls.__name__,
        owner_classes=tuple(names),
        is_norm=any(NORM_CLASS.search(base.__name__) for base in classes),
        is_embedding=issubclass(cls, (torch.nn.Embedding, torch.nn.EmbeddingBag)),
        is_peft_layer=is_peft_layer,
        holds_copies=issubclass(cls, holders),
        adapter_attributes=frozenset(attributes),
        roles=ROLE_OF_ATTRIBUTE | next((LAYER_ROLES[name] for name in names if name in LAYER_ROLES), {}),
    )


def _peft_classes() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Return PEFT's layer classes, and PEFT's wrapper classes for trained copies of modules."""
    if "peft" not in sys.modules:  # without PEFT imported, no layer can be a PEFT layer
        return (), ()
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return (BaseTunerLayer,), (ModulesToSaveWrapper, LNTuningLayer)
