"""Every method of PEFT by name, and whether LoRA+ has a pair of factors to split in it."""

from __future__ import annotations

SPLIT = "split"

_PROMPT = "trains virtual tokens or a prompt encoder, so it has no pair of factors (A and B)"
_ROTATION = "trains an orthogonal transformation of the weight, so it has no pair of factors (A and B)"
_SPECTRUM = "trains coefficients of a fixed basis, so it has no pair of factors (A and B)"
_SCALES = "trains scales (or rotations) of activations, so it has no pair of factors (A and B)"
_PRODUCT = "its update isn't linear in one pair of factors, so eta_B / eta_A has no meaning"
_SHARED_BASIS = "trains coefficients over frozen or shared factors, so it has no pair of factors (A and B)"

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
    "MISS": "trains one block a layer, so it has no pair of factors (A and B)",
    "SHIRA": "trains some entries of the weight, so it has no pair of factors (A and B)",
    "OSF": "trains the weight itself within a subspace, so it has no pair of factors (A and B)",
    "BEFT": "trains biases, so it has no pair of factors (A and B)",
    "LN_TUNING": "trains normalisation layers, so it has no pair of factors (A and B)",
    "TRAINABLE_TOKENS": "trains rows of an embedding, so it has no pair of factors (A and B)",
    "XLORA": "trains a router over frozen LoRA adapters, so it has no pair of factors (A and B)",
    "SHADOW": "trains a network beside the model, so it has no pair of factors (A and B)",
}
"""Each `peft.PeftType` by name: `SPLIT`, or why LoRA+ does nothing there."""
