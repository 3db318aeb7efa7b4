"""Export of a finished run: the merged model or the adapter, with a card.

After an error no folder is left.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, Problem, UserError, first_line
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.files import copy_file
from loraplus_hydra.io.folders import new_folder
from loraplus_hydra.io.quiet_libraries import quiet_peft
from loraplus_hydra.models.adapter_files import attach, save_adapter, stored_adapter
from loraplus_hydra.models.inputs import READ_OF_ADAPTER
from loraplus_hydra.models.quantization import dequantize, is_quantized
from loraplus_hydra.runs.export_commands import Served
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.load_finished import load_run, refuse_changed_run
from loraplus_hydra.runs.model_card import card, write_card

ROWS_COMPARED = (4, 16)  # number of rows and tokens for the comparison of the export's and the run's logits
# Differences of logits that rounding can cause, relative to the largest logit.
ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
# PEFT's layers that replace a layer's weight: adapted layers, and trained copies.
_CHANGED = (BaseTunerLayer, ModulesToSaveWrapper)


def export(
    run: FinishedRun,
    folder: Path,
    *,
    merge: bool = True,
    dtype: str | None = None,
    served: Served | None = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Write a run's model into `folder`, which is new or empty, and return the folder.

    With `merge`, the merged model is written, with weights in `dtype` (None: the run's dtype). Weights of a quantised
    base are dequantised. Without `merge`, the adapter is written. The tokenizer and a card are added to both. Before
    the folder gets its name, the merged model is loaded again, and its logits are compared with the run's; `report`
    gets the outcome as text. With `served` (from `export_check.check_target`), what a target needs is written, too.
    Raises UserError, and then no folder is left.
    """
    assert served is None or served.export.merged == merge, "the check was for the other kind of export"
    card(run, merged=merge)  # a file that it can't be made from is told before the weights load
    check = ""
    with interrupts.notice("the export's folder is removed"), new_folder(folder, key="to") as draft:
        if merge:
            check = _comparison(_write_merged(run, draft, dtype))
        elif run.step is None:
            refuse_changed_run(run)
            _copy_adapter(run.adapter, draft)
        else:  # a checkpoint has other files, and its adapter may fit only a base that the initialisation changed
            save_adapter(*load_run(run), draft)
        if served is not None:
            served.write(draft)
        write_card(run, draft, merged=merge, check=check, serving="" if served is None else served.section())
        interrupts.stop_if_asked()  # after this line the folder is kept
    if check and report is not None:
        report(check)
    return folder


def _comparison(difference: float) -> str:
    rows, tokens = ROWS_COMPARED
    return (
        f"On {rows} rows of {tokens} random tokens the merged model's logits differ by at most {difference:.2g} "
        "from those of the base model with the adapter."
    )


def _copy_adapter(adapter: Path, folder: Path) -> None:
    """Copy the adapter's files. Pickles, code and folders are not copied.

    Raises UserError for a link to a file outside the folder.
    """
    stored_adapter(str(adapter), key="run")
    for file in sorted(adapter.iterdir()):
        if file.suffix not in READ_OF_ADAPTER or not file.is_file():
            continue
        # Through a link, the export could publish any file of this machine.
        if not file.resolve().is_relative_to(adapter.resolve()):
            raise ConfigErrors(
                [Problem("run", f"{file} is a link to a file outside the adapter's folder", "remove it")]
            )
        copy_file(file, folder / file.name)


def _write_merged(run: FinishedRun, folder: Path, dtype: str | None) -> float:
    """Write the merged model and the tokenizer.

    Return the largest difference between its logits and the run's. Raises UserError if the difference is larger than
    rounding can cause.
    """
    model, tokenizer = load_run(run)
    rows = _random_rows(model)
    of_run = _logits(model, rows)
    interrupts.stop_if_asked()
    full = _dequantized(model, run)
    unmerged = of_run if full is model else _logits(full, rows)
    if dtype is not None:  # merged in the dtype that holds both, because the run's dtype would round the update
        own = full.get_base_model().dtype
        if (both := torch.promote_types(own, getattr(torch, dtype))) is not own:
            full = full.to(both)
    merged = _merged(full)
    if dtype is not None:
        merged = merged.to(getattr(torch, dtype))
    interrupts.stop_if_asked()
    _save(merged, folder)
    tokenizer.save_pretrained(str(folder))
    del model, full, merged  # before the export is loaded, because two models may not fit into the memory
    gc.collect()
    interrupts.stop_if_asked()
    exported = locate(run.config.task.auto_class).from_pretrained(
        str(folder), dtype="auto", trust_remote_code=run.config.model.trust_remote_code
    )
    logits = _logits(exported, rows)
    _refuse_difference(logits, unmerged, _rounding(exported.dtype, run))
    return _refuse_difference(logits, of_run, max(_rounding(exported.dtype, run), _quantization_error(run)))


def _refuse_difference(logits: torch.Tensor, expected: torch.Tensor, share: float) -> float:
    """Return the largest difference. Raises UserError if it is above `share` of the largest logit."""
    difference = float((logits - expected).abs().max())
    bound = share * max(1.0, float(expected.abs().max()))
    if not difference <= bound:  # written this way because a comparison with NaN is False
        raise UserError(
            f"merge: the merged model's logits differ from the run's by {difference:.2g}, but rounding can cause only "
            f"{bound:.2g}; use merge=false"
        )
    return difference


def _save(model: Any, folder: Path) -> None:
    """Write a merged model. Raises UserError if the file format can't store it."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = model.config.get_text_config().tie_word_embeddings
    if not is_tied and getattr(output, "weight", None) is embedding.weight:  # two trained layers with one weight
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    try:
        model.save_pretrained(str(folder), safe_serialization=True)
    except RuntimeError as error:  # layers that share a weight, as replicated ones do
        raise UserError(f"merge: the merged model can't be stored: {first_line(error)}; use merge=false") from error


def _merged(full: PeftModel) -> Any:
    """Return the model with the adapter's update merged into its weights. Raises UserError."""
    _untie(full)
    try:
        with quiet_peft():
            return full.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError) as error:
        kind = full.active_peft_config.peft_type
        raise UserError(f"merge: {kind} can't be merged into the weights ({error}); use merge=false") from error
    except ValueError as error:  # safe_merge has found a number that isn't finite
        raise UserError(f"run: the adapter can't be merged: {error}") from error


def _dequantized(model: PeftModel, run: FinishedRun) -> PeftModel:
    """Return the model with dequantised weights."""
    if not is_quantized(run.config.quantization):
        return model
    base = dequantize(model.unload(), run.config.model.dtype)
    return attach(base, stored_adapter(str(run.adapter), key="run"))


def _untie(model: PeftModel) -> None:
    """Untie the output layer from the embedding if the adapter changes one of them."""
    base = model.get_base_model()
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    if output is None or not base.config.get_text_config().tie_word_embeddings:
        return
    # Rows of new tokens stay tied, because PEFT trains the same rows for both layers.
    if not isinstance(embedding, _CHANGED) and not isinstance(output, _CHANGED):
        return
    layer = output.get_base_layer() if isinstance(output, BaseTunerLayer) else output
    if isinstance(layer, torch.nn.Linear):
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False


def _random_rows(model: Any) -> torch.Tensor:
    """Return a few rows of random tokens without padding, the same in each call."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = torch.randint(0, vocabulary, ROWS_COMPARED, generator=torch.Generator().manual_seed(0))
    pad = model.config.get_text_config().pad_token_id
    return rows if pad is None else torch.where(rows == pad, (pad + 1) % vocabulary, rows)


def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=rows.to(model.device), attention_mask=torch.ones_like(rows)).logits
    return logits.float().cpu()


def _rounding(dtype: torch.dtype, run: FinishedRun) -> float:
    """Return the difference that rounding to `dtype` can cause, relative to the largest logit."""
    return max(ROUNDING.get(str(dtype).removeprefix("torch."), 5e-2), ROUNDING.get(run.config.model.dtype, 5e-2))


def _quantization_error(run: FinishedRun) -> float:
    """Return the difference that the computations of a quantised base can cause."""
    if not is_quantized(run.config.quantization):
        return 0.0
    return 1e-1 if run.config.quantization.get("load_in_8bit") else 1e-2  # int8 rounds what goes into a layer as well
