"""Tables of PEFT's methods: the role of each attribute, and whether LoRA+ has factors to split.

A test compares them with `peft.PeftType`, which fails for a new method that is missing here.
"""

from __future__ import annotations

from loraplus_hydra.loraplus.starts import A_ZERO, TRAINED

ROLE_OF_ATTRIBUTE: dict[str, str] = {
    # LoRA in all its initialisations and variants, on linears, convolutions, embeddings and fused experts
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "magnitude",
    # VeRA and PVeRA: frozen shared matrices, one trained vector on the input side (d) and one on the output side (b)
    "vera_lambda_b": "vera_b",
    "vera_lambda_d": "vera_d",
    "pvera_lambda_b": "vera_b",
    "pvera_lambda_d": "vera_d",
    # Methods whose update is linear in such a pair, with B zero at the start: the paper's argument holds as it does
    # for LoRA
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
    # The factors of P E Q under LoRA's names; E starts at zero.
    "peft.tuners.adalora.layer.AdaLoraLayer": {"lora_A": "adalora_A", "lora_B": "adalora_B", "lora_E": "adalora_E"},
}
"""Class of a PEFT layer -> roles of those of its attributes that mean something else than in ROLE_OF_ATTRIBUTE."""

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
"""Roles of an adapter's own tensors, whose start its config decides."""

SPLIT = "split"

_PROMPT = "trains virtual tokens or a prompt encoder; no pair of factors"
_ROTATION = "trains an orthogonal transformation of the weight; no pair of factors"
_SPECTRUM = "trains coefficients of a fixed basis; no pair of factors"
_SCALES = "trains scales (or rotations) of activations; no pair of factors"
_PRODUCT = "its update isn't linear in one pair of factors, so eta_B / eta_A has no meaning"
_SHARED_BASIS = "trains coefficients over frozen or shared factors; no pair of factors"

LORAPLUS_SUPPORT: dict[str, str] = {
    "LORA": SPLIT,
    "ADALORA": SPLIT,
    "VERA": SPLIT,
    "PVERA": SPLIT,
    "HIRA": SPLIT,
    "GRALORA": SPLIT,
    "LILY": SPLIT,
    "POLY": SPLIT,
    "SUPERTUNING": SPLIT,
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "OFT": _ROTATION,
    "BOFT": _ROTATION,
    "HRA": _ROTATION,
    "PSOFT": _ROTATION,
    "ROAD": _SCALES,
    "IA3": _SCALES,
    "FOURIERFT": _SPECTRUM,
    "WAVEFT": _SPECTRUM,
    "C3A": _SPECTRUM,
    "LOHA": _PRODUCT,
    "LOKR": _PRODUCT,
    "DELORA": "normalises both factors, so their rates don't set how far the update moves; what does is one scalar",
    "GLORA": "trains up to five small supports a layer, none of them a pair like LoRA's",
    "PEANUT": _PRODUCT,
    "DEFT": _PRODUCT,
    "ADAMSS": "trains many small subspaces, with a start that isn't zero",
    "VBLORA": _SHARED_BASIS,
    "UNILORA": _SHARED_BASIS,
    "TINYLORA": _SHARED_BASIS,
    "RANDLORA": _SHARED_BASIS,
    "FROD": _SHARED_BASIS,
    "MISS": "trains one block a layer; no pair of factors",
    "SHIRA": "trains some entries of the weight; no pair of factors",
    "OSF": "trains the weight itself within a subspace; no pair of factors",
    "BEFT": "trains biases; no pair of factors",
    "LN_TUNING": "trains normalisation layers; no pair of factors",
    "TRAINABLE_TOKENS": "trains rows of an embedding; no pair of factors",
    "XLORA": "trains a router over frozen LoRA adapters; no pair of factors",
    "SHADOW": "trains a network beside the model; no pair of factors",
}
"""Each `peft.PeftType` by name: `SPLIT`, or why LoRA+ does nothing there."""

FACTORS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
"""Roles of the two factors of a LoRA update."""


def zero_start(role: str, initialisation: object) -> bool | None:
    """Return True if a tensor starts at zero, by its role and its config's `init_lora_weights`.

    `initialisation` may also be `A_ZERO` or `TRAINED` of starts.py. Returns None where it is unknown: False (no
    initialisation) usually means that the caller writes the factors later. Source: the `reset_*` and `*_init` methods
    of PEFT 0.21's layers.
    """
    if initialisation == TRAINED:
        return False if role in ADAPTER_ROLES else None
    if role == "lora_B_bias":
        return None if initialisation is False else True
    if role in ("vera_b", "adalora_E"):
        return None if initialisation is False else True
    if role in ("vera_d", "adalora_A", "adalora_B"):
        return None if initialisation is False else False
    if role in ("magnitude", "trainable_tokens"):
        return False
    if role not in FACTORS or initialisation is False:
        return None
    name = initialisation.lower() if isinstance(initialisation, str) else initialisation
    if name in ("mica", A_ZERO):
        return role in ("lora_A", "lora_embedding_A")
    # On embeddings PEFT swaps the factors' starts: A is zero, B random. LoRA-GA falls back to that there.
    if role.startswith("lora_embedding_"):
        return role == "lora_embedding_A" if name in (True, "gaussian", "eva", "lora_ga") else None
    if name in (True, "gaussian", "eva"):
        return role == "lora_B"
    return False if isinstance(name, str) else None
