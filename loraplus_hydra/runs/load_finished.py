"""Load the model of a finished run with its adapter, and the tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import set_seed

from loraplus_hydra.io.quiet_libraries import quiet_loading
from loraplus_hydra.models.adapter_files import attach, stored_adapter
from loraplus_hydra.models.base_model import load_base
from loraplus_hydra.models.properties import is_classifier, label_names, positions
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.stored_config import KEY
from loraplus_hydra.tasks.base import Base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def load_run(run: FinishedRun, *, trainable: bool = False) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the run's model with its adapter and its tokenizer. Raises UserError."""
    quiet_loading()
    stored = stored_adapter(str(run.adapter), key=KEY)
    tokenizer = load_run_tokenizer(run)
    # Rows of new tokens and a new head: all of them are the adapter's, but some are drawn first.
    set_seed(run.config.seed)
    base = load_base(run.config, tokenizer, run.model_arguments())
    base.config.use_cache = True
    model = attach(base, stored, trainable=trainable)
    model.eval()
    return model, tokenizer


def load_run_tokenizer(run: FinishedRun) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with the run's adapter."""
    model = run.config.model.copy()
    model.tokenizer, model.add_tokens, model.pad_token, model.revision = str(run.adapter.absolute()), [], None, None
    return load_tokenizer(model)


def base_of(run: FinishedRun) -> Base:
    """Return the properties of the run's weights that other rows must fit."""
    places = positions(run.config.model, run.config.task.auto_class)
    labels = label_names(run.model_arguments().get("id2label", {})) if is_classifier(run.config) else ()
    return Base(labels=labels, head="the run", positions=places)
