"""Export of a finished run: a merged model or the adapter, with a card, complete or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import files
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.models.adapter_files import attach, stored_adapter
from loraplus_hydra.models.quantization import dequantize, is_quantized
from loraplus_hydra.runs.finished import FinishedRun, load_run
from loraplus_hydra.runs.model_card import write_card

_COPIED = (".json", ".safetensors", ".jinja", ".model", ".txt")  # PEFT's and a tokenizer's
DTYPES = ("float32", "bfloat16", "float16")


def export(run: FinishedRun, target: Path, *, merge: bool = True, dtype: str | None = None) -> Path:
    """Write a finished run into `target`, a folder that is new or empty; returns it.

    With `merge` the whole model, its weights in `dtype` (None: the run's; those of a quantised base dequantised first);
    without it the adapter. Either with the tokenizer and a card. Raises UserError, and leaves nothing behind then.
    """
    draft = files.unfinished(target)
    shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
    made = [folder for folder in (draft.parent, *draft.parent.parents) if not folder.exists()]
    draft.mkdir(parents=True)
    try:
        if merge:
            _write_merged(run, draft, dtype)
        else:
            _copy_adapter(run.adapter, draft)
        write_card(run, draft, merged=merge)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        raise
    return target


def _copy_adapter(adapter: Path, folder: Path) -> None:
    """The adapter's files, without what no run writes there: pickles, code, folders.

    A link could have any file of this machine published. Raises UserError for one that leads out of the folder.
    """
    stored_adapter(str(adapter), key="run")
    for file in sorted(adapter.iterdir()):
        if file.suffix not in _COPIED or not file.is_file():
            continue
        if not file.resolve().is_relative_to(adapter.resolve()):
            raise ConfigErrors([Problem("run", f"{file} is a link out of the adapter's folder", "remove it")])
        shutil.copy(file, folder / file.name)


def merged_model(run: FinishedRun, dtype: str | None = None) -> tuple[Any, Any]:
    """The run's model with the adapter's update added to its weights, and the tokenizer. Raises UserError."""
    model, tokenizer = load_run(run)
    dequantized = _dequantized(model, run)
    _untie(dequantized)
    try:
        with quiet_peft():
            merged = dequantized.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError) as error:
        kind = dequantized.active_peft_config.peft_type
        raise UserError(f"merge: {kind} can't be merged into the weights ({error}); use merge=false") from error
    except ValueError as error:  # safe_merge found a number that isn't finite
        raise UserError(f"run: the adapter can't be merged: {error}") from error
    if dtype is not None:
        merged = merged.to(getattr(torch, dtype))
    return merged, tokenizer


def _write_merged(run: FinishedRun, folder: Path, dtype: str | None) -> None:
    merged, tokenizer = merged_model(run, dtype)
    merged.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


def _dequantized(model: PeftModel, run: FinishedRun) -> PeftModel:
    """The model on full weights: those that its quantised ones stand for, to which the adapter was trained."""
    if not is_quantized(run.config.quantization):
        return model
    base = dequantize(model.unload(), run.config.model.dtype)
    return attach(base, stored_adapter(str(run.adapter), key="run"))


def _untie(model: PeftModel) -> None:
    """Give the output layer weights of its own where the adapter changes the embedding that it shares."""
    base = model.get_base_model()
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    if output is None or not isinstance(embedding, BaseTunerLayer) or isinstance(output, BaseTunerLayer):
        return
    if base.config.get_text_config().tie_word_embeddings:
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        base.config.get_text_config().tie_word_embeddings = False
