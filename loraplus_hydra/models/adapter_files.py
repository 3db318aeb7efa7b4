"""An adapter's folder in PEFT's own layout: written whole, read from safetensors only, and trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus_hydra.config.locations import is_local, model_location
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.io.run_folder import ADAPTER

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY = "adapter.path"
# Fields of a PEFT config that say how an adapter started or was stored, not what it is.
_NOT_COMPARED = (
    *("init_lora_weights", "target_modules", "task_type", "inference_mode", "revision", "auto_mapping"),
    *("tinit", "tfinal", "total_step", "orth_reg_weight", "trainable_token_indices", "modules_to_save"),
)
# Fields that have PEFT read further files, or import a package, while it builds the adapter.
_LEADING_ELSEWHERE = ("megatron_config", "prompt_tuning_init_state_dict_path", "adapters", "shadow_model")
_ANY_RANK = 65_536  # more than anybody trains


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk: its folder and its PEFT config."""

    folder: Path
    config: PeftConfig

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, from the file's header alone."""
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def not_finite(self) -> str | None:
        """The name of a tensor with a number that isn't finite, or None."""
        from safetensors import safe_open

        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            names = (name for name in file.keys() if not file.get_tensor(name).isfinite().all())  # noqa: SIM118
            return next(names, None)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter, its tokenizer and the base's config.json (with a classifier's label names) into `folder`.

    What is written is right on the original base, whatever the start of the factors was. The base's embedding isn't
    stored, as PEFT would do where LoRA sits on it or it has grown: it is frozen, and new rows are the adapter's own.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    from loraplus_hydra.models.initialisation import on_original_base

    save_factors(model, folder)
    initial = getattr(model, "initial_factors", None)
    if initial:
        tensors, config = on_original_base(
            load_file(folder / WEIGHTS), initial, PeftConfig.from_pretrained(str(folder))
        )
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(folder))
    base_config = model.get_base_model().config
    used, base_config.use_cache = base_config.use_cache, True  # switched off for training alone
    base_config.save_pretrained(str(folder))
    base_config.use_cache = used
    tokenizer.save_pretrained(str(folder))


def save_factors(model: PeftModel, folder: Path, **arguments: Any) -> None:
    """PEFT's own files of the trained tensors, without its card of placeholders: `export` writes one that is true.

    Not the frozen embedding, nor DPO's frozen reference, which is a second adapter. `arguments` are of PEFT's
    `save_pretrained`.
    """
    model.save_pretrained(
        str(folder), safe_serialization=True, save_embedding_layers=False, selected_adapters=["default"], **arguments
    )
    (folder / "README.md").unlink(missing_ok=True)


def stored_adapter(path: str, key: str = KEY) -> StoredAdapter:
    """The adapter at `path`: its folder, a run's folder, or a hub name. Raises ConfigErrors naming `key`.

    It may come from anybody: nothing of it is run, and nothing but its two files is read.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError

    folder = _fetched(path, key) if not is_local(path) else Path(model_location(path))
    if (folder / ADAPTER / CONFIG).is_file():
        folder = folder / ADAPTER
    if not (folder / CONFIG).is_file():
        raise ConfigErrors([Problem(key, f"there is no {CONFIG} in {folder}", "name an adapter's folder, or a run's")])
    if not (folder / WEIGHTS).is_file():
        why = "only safetensors are read, since a pickle can run code"
        raise ConfigErrors([Problem(key, f"there is no {WEIGHTS} in {folder}", why)])
    try:
        config = PeftConfig.from_pretrained(str(folder))
        reason = "" if config.peft_type else "it names no method of PEFT"
    except Exception as error:  # PEFT takes the file for one of its own, and raises whatever comes of it
        config, reason = None, first_line(error)
    if reason:
        raise ConfigErrors([Problem(key, f"{folder / CONFIG} can't be read: {reason}", "name another adapter")])
    stored = StoredAdapter(folder, config)
    try:
        shapes, broken = stored.shapes(), stored.not_finite()
    except (SafetensorError, OSError, RuntimeError) as error:
        what = f"{folder / WEIGHTS} can't be read: {first_line(error)}"
        raise ConfigErrors([Problem(key, what, "only safetensors are read, since a pickle can run code")]) from error
    problems = [Problem(key, f"{folder / CONFIG}: {what}", "name another adapter") for what in _unsafe(config, shapes)]
    if broken is not None:
        problems.append(Problem(key, f"{folder / WEIGHTS}: {broken} has numbers that aren't finite", "name another"))
    if problems:
        raise ConfigErrors(problems)
    return stored


def _unsafe(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What of an adapter's config leads to other files or packages, or asks for far more memory than its tensors."""
    found = [f"{name} leads out of the folder" for name in _LEADING_ELSEWHERE if getattr(config, name, None)]
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    most = max(largest, _ANY_RANK)
    patterns = getattr(config, "rank_pattern", None)
    sizes = {name: getattr(config, name, None) for name in ("r", "num_virtual_tokens")}
    sizes |= {f"rank_pattern.{name}": size for name, size in (patterns.items() if isinstance(patterns, dict) else ())}
    for name, size in sizes.items():
        if isinstance(size, (int, float)) and not 0 <= size <= most:
            found.append(f"{name} is {size}, but no tensor of the adapter has a side longer than {largest}")
    return found


def attach(model: PreTrainedModel, stored: StoredAdapter, *, trainable: bool = False) -> PeftModel:
    """`model` with a stored adapter on it. Raises UserError when its tensors don't fit."""
    from peft import PeftModel

    stored.config.inference_mode = not trainable
    if getattr(stored.config, "prompt_tuning_init", None) == "TEXT":  # a start, which would load a tokenizer by name
        stored.config.prompt_tuning_init = type(stored.config.prompt_tuning_init)("RANDOM")
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(stored.folder), is_trainable=trainable, config=stored.config)
    except Exception as error:  # PEFT raises whatever comes of a config or tensors that aren't this model's
        first = first_line(error)
        raise UserError(f"the adapter in {stored.folder} doesn't fit the model: {first}") from error
    if misfits := _misfits(adapted, stored, names_alone=True):
        raise UserError(f"the adapter in {stored.folder} doesn't fit the model: {misfits}")
    return adapted


def continue_adapter(
    model: PreTrainedModel,
    path: str,
    wanted: PeftConfig | None,
    *,
    new_tokens: Sequence[int] = (),
    on_meta: bool = False,
) -> PeftModel:
    """`model` with the adapter at `path` to train on. Raises ConfigErrors when it can't be, or isn't as `wanted`.

    `wanted` is the config that the run's own keys give, or None to take the adapter's. On the meta device the stored
    tensors' names and shapes are compared with the model's; elsewhere they are loaded.
    """
    stored = stored_adapter(path)
    problems = [*_cannot_go_on(stored, new_tokens), *_other_base(stored, model), *_differences(stored.config, wanted)]
    if problems:
        raise ConfigErrors(problems)
    if not on_meta:
        return attach(model, stored, trainable=True)
    from peft import get_peft_model

    stored.config.inference_mode = False
    adapted: Any = get_peft_model(model, wanted or stored.config, low_cpu_mem_usage=True)
    if misfits := _misfits(adapted, stored):
        raise ConfigErrors([Problem(KEY, misfits, "adapter=existing takes the adapter's own settings")])
    return adapted


def refuse_other_tensors(folder: Path, adapted: PeftModel) -> None:
    """Raise UserError unless the weights in a checkpoint's `folder` are those of `adapted`, by names and shapes.

    `adapted` may be on the meta device; of the weights the header alone is read.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError

    try:
        misfits = _misfits(adapted, StoredAdapter(folder, PeftConfig()))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS} can't be read: {first_line(error)}") from None
    if misfits:
        raise UserError(f"{folder / WEIGHTS} isn't of this run: {misfits}")


def _cannot_go_on(stored: StoredAdapter, new_tokens: Sequence[int]) -> list[Problem]:
    from loraplus_hydra.models.initialisation import changes_base

    if new_tokens and not getattr(stored.config, "trainable_token_indices", None):
        return [Problem("model.add_tokens", "the adapter at adapter.path has no rows for new tokens", "leave it empty")]
    if getattr(stored.config, "rank_pattern", None) and stored.config.peft_type == "ADALORA":
        what = "AdaLoRA has cut this adapter's ranks, and can't cut them again"
        return [Problem(KEY, what, "merge it (export) and start from the merged model")]
    if changes_base(getattr(stored.config, "init_lora_weights", None)):
        what = f"it is stored as {stored.config.init_lora_weights}, whose base isn't the original one"
        return [Problem(KEY, what, "store it as plain LoRA (path_initial_model_for_weight_conversion of PEFT)")]
    return []


def _other_base(stored: StoredAdapter, model: PreTrainedModel) -> list[Problem]:
    """The adapter's base by name; a moved folder keeps its last part."""
    then, now = stored.config.base_model_name_or_path, model.name_or_path
    if not then or not now or Path(then).name == Path(now).name:
        return []
    fix = f"set model.path={then}; if that is the same model, write its new name into {stored.folder / CONFIG}"
    return [Problem(KEY, f"the adapter was trained on {then}, and model.path is {now}", fix)]


def _differences(stored: PeftConfig, wanted: PeftConfig | None) -> list[Problem]:
    if wanted is None:
        return []
    then, now = _comparable(stored), _comparable(wanted)
    return [
        Problem(f"adapter.{name}", f"is {now[name]}, but {then.get(name)} in the adapter at {KEY}", "adapter=existing")
        for name in now
        if name not in _NOT_COMPARED and now[name] != then.get(name)
    ]


def _comparable(config: PeftConfig) -> dict[str, Any]:
    """Fields as JSON has them, with empty values alike."""
    plain = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    del plain["base_model_name_or_path"]
    kept = json.loads(json.dumps(plain, default=str))
    return {name: value or None for name, value in kept.items() if name not in ("peft_version",)}


def _misfits(adapted: PeftModel, stored: StoredAdapter, *, names_alone: bool = False) -> str:
    """The first tensor that the model or the file lacks, or (unless `names_alone`) has in another shape."""
    from peft import get_peft_model_state_dict

    here = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    # Of the base's own tensors trained biases count; an embedding that PEFT has stored beside them doesn't.
    there = {name: shape for name, shape in stored.shapes().items() if ".base_layer." not in name or name in here}
    for name in sorted(here.keys() ^ there.keys() if names_alone else here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            return f"{name} is {there.get(name, 'missing')} in the adapter, but {here.get(name, 'missing')} in this run"
    return ""


def _fetched(path: str, key: str) -> Path:
    """The files of an adapter on a hub: its config and its safetensors, nothing else."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise ConfigErrors([Problem(key, f"{path}: {first}", "name an adapter's folder, or one on the hub")]) from error
