"""The roles of PEFT's tensors, and the tensors that start at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ADAPTER_NAME = "default"  # PEFT's name for a model's first adapter; every adapter that this program trains has it
A_ZERO = "a_zero"  # value of adapter.init_lora_weights for the paper's Init[2], which PEFT doesn't have
EVA = "eva"  # value of adapter.init_lora_weights for a start from the training rows
LOFTQ = "loftq"  # value of adapter.init_lora_weights; PEFT's own start with this name replaces the base's weights
TRAINED = "trained"  # initialisation of an adapter that an earlier run trained

ROLE_OF_ATTRIBUTE: dict[str, str] = {
    # LoRA in all its initialisations and variants, on linears, convolutions, embeddings and fused experts
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "magnitude",
    # VeRA and PVeRA: frozen shared matrices, one trained vector for the input (d) and one for the output (b)
    "vera_lambda_b": "vera_b",
    "vera_lambda_d": "vera_d",
    "pvera_lambda_b": "vera_b",
    "pvera_lambda_d": "vera_d",
    # Methods whose update is linear in such a pair and whose B starts at zero. The paper's argument for LoRA applies to
    # them.
    "hira_A": "lora_A",
    "hira_B": "lora_B",
    "hira_embedding_A": "lora_embedding_A",
    "hira_embedding_B": "lora_embedding_B",
    "gralora_A": "lora_A",
    "gralora_B": "lora_B",
    "gralora_A_general": "lora_A",
    "gralora_B_general": "lora_B",
    "lily_A": "lora_A",
    "lily_B": "lora_B",
    "poly_lora_A": "lora_A",
    "poly_lora_B": "lora_B",
    "supertuning_lora_A": "lora_A",
    "supertuning_lora_B": "lora_B",
    "trainable_tokens_delta": "trainable_tokens",
}
"""Attribute of a PEFT layer (one of its `adapter_layer_names`) -> role; any other attribute's tensors are `other`."""

LAYER_ROLES: dict[str, dict[str, str]] = {
    # AdaLoRA's factors P E Q have LoRA's attribute names. E starts at zero.
    "peft.tuners.adalora.layer.AdaLoraLayer": {"lora_A": "adalora_A", "lora_B": "adalora_B", "lora_E": "adalora_E"},
}
"""Class of a PEFT layer -> roles of its attributes that differ from ROLE_OF_ATTRIBUTE."""

LORA_B_ROLES = ("lora_B", *(roles["lora_B"] for roles in LAYER_ROLES.values() if "lora_B" in roles))
"""Roles of the tensors that PEFT calls lora_B."""

ADAPTER_ROLES = tuple(
    dict.fromkeys(
        [
            *ROLE_OF_ATTRIBUTE.values(),
            *(role for roles in LAYER_ROLES.values() for role in roles.values()),
            "lora_B_bias",
        ]
    )
)
"""Roles of an adapter's own tensors. The adapter's config decides how they start."""

FACTORS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
"""Roles of the two factors of a LoRA update."""


def zero_start(role: str, initialisation: object) -> bool | None:
    """Return True if a tensor with this role starts at zero under this `init_lora_weights`.

    `initialisation` may also be `A_ZERO` or `TRAINED`. Returns None if the start is unknown. False (no initialisation)
    usually means that the caller writes the factors later, so the start is unknown then, too. Source: the `reset_*` and
    `*_init` methods of PEFT 0.21's layers.
    """
    if initialisation == TRAINED:
        return False if role in ADAPTER_ROLES else None
    if role in ("magnitude", "trainable_tokens"):
        return False
    if initialisation is False or role not in ADAPTER_ROLES:
        return None
    if role not in FACTORS:  # for these roles the kind of initialisation has no effect
        return role in ("lora_B_bias", "vera_b", "adalora_E")
    name = initialisation.lower() if isinstance(initialisation, str) else initialisation
    if name in ("mica", A_ZERO):
        return role in ("lora_A", "lora_embedding_A")
    # For embeddings PEFT exchanges the factors' starts: A is zero, B random. LoRA-GA also starts embeddings in this
    # way.
    if role.startswith("lora_embedding_"):
        return role == "lora_embedding_A" if name in (True, "gaussian", "eva", "lora_ga") else None
    if name in (True, "gaussian", "eva"):
        return role == "lora_B"
    return False if isinstance(name, str) else None


def note_initialisation(model: nn.Module, initialisation: str) -> None:
    """Store on the model that its adapter's initialisation is `A_ZERO` or `TRAINED`."""
    model.adapter_initialisations = {ADAPTER_NAME: initialisation}  # type: ignore[assignment]


def noted_initialisations(model: nn.Module) -> dict[str, str]:
    """Return the initialisations that `note_initialisation` stored, by adapter."""
    return getattr(model, "adapter_initialisations", None) or {}
