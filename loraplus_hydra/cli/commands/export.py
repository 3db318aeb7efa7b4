"""`export`: a finished run taken away, as a whole model or as an adapter, with a card; written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from loraplus_hydra.errors import ConfigErrors, Problem, UserError
from loraplus_hydra.io import files
from loraplus_hydra.io.files import refuse_unwritable
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.runs.finished import FinishedRun, load_run, named_run, open_run, unnamed_run

if TYPE_CHECKING:
    from peft import PeftModel

_COPIED = (".json", ".safetensors", ".jinja", ".model", ".txt")  # PEFT's and a tokenizer's
_DTYPES = ("float32", "bfloat16", "float16")


def main(config: DictConfig, flags: frozenset[str]) -> None:
    """Write the run's merged model, or its adapter, into a new folder. Raises UserError."""
    problems = unnamed_run(config)
    if config.dtype is not None and (config.dtype not in _DTYPES or not config.merge):
        what = f"'{config.dtype}' is no dtype" if config.merge else "an adapter keeps the dtype that it was trained in"
        problems.append(Problem("dtype", what, f"one of: {', '.join(_DTYPES)}" if config.merge else "leave it null"))
    if problems:
        raise ConfigErrors(problems)
    run = open_run(named_run(config), {"model": config.model}, trust_remote_code=config.trust_remote_code)
    target = (
        Path(config.to).expanduser() if config.to else run.folder / "export" / ("model" if config.merge else "adapter")
    )
    files.refuse_used_folder(target, key="to")
    refuse_unwritable(target.parent, key="to")
    written = export(run, target, merge=config.merge, dtype=config.dtype)
    print(f"{'The merged model' if config.merge else 'The adapter'} lies in {written}, with its card in README.md.")


def export(run: FinishedRun, target: Path, *, merge: bool = True, dtype: str | None = None) -> Path:
    """Write a finished run into `target`, a folder that is new or empty; returns it.

    With `merge` the whole model, its weights in `dtype` (None: the run's; those of a quantised base dequantised first);
    without it the adapter. Either with the tokenizer and a card. Raises UserError, and leaves nothing behind then.
    """
    from loraplus_hydra.runs.model_card import write_card

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
    from loraplus_hydra.models.adapter_files import stored_adapter

    stored_adapter(str(adapter), key="run")
    for file in sorted(adapter.iterdir()):
        if file.suffix not in _COPIED or not file.is_file():
            continue
        if not file.resolve().is_relative_to(adapter.resolve()):
            raise ConfigErrors([Problem("run", f"{file} is a link out of the adapter's folder", "remove it")])
        shutil.copy(file, folder / file.name)


def merged_model(run: FinishedRun, dtype: str | None = None) -> tuple[Any, Any]:
    """The run's model with the adapter's update added to its weights, and the tokenizer. Raises UserError."""
    import torch

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
    from loraplus_hydra.models.adapter_files import attach, stored_adapter
    from loraplus_hydra.models.quantization import dequantize, is_quantized

    if not is_quantized(run.config.quantization):
        return model
    base = dequantize(model.unload(), run.config.model.dtype)
    return attach(base, stored_adapter(str(run.adapter), key="run"))


def _untie(model: PeftModel) -> None:
    """Give the output layer weights of its own where the adapter changes the embedding that it shares."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    if output is None or not isinstance(embedding, BaseTunerLayer) or isinstance(output, BaseTunerLayer):
        return
    if base.config.get_text_config().tie_word_embeddings:
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        base.config.get_text_config().tie_word_embeddings = False
