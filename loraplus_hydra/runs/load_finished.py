"""The model of a finished run with its adapter, and the tokenizer."""

from __future__ import annotations

import sys

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from loraplus_hydra.errors import ConfigErrors, Problem
from loraplus_hydra.io import interrupts
from loraplus_hydra.io.fingerprints import NOT_STORED, refuse_changed
from loraplus_hydra.io.quiet_libraries import quiet_loading, quiet_peft
from loraplus_hydra.loraplus.peft_layers import EVA
from loraplus_hydra.models.adapter import add_adapter
from loraplus_hydra.models.adapter_files import attach, load_tensors, stored_adapter
from loraplus_hydra.models.base_model import load_base
from loraplus_hydra.models.initialisation import changes_base
from loraplus_hydra.models.inputs import adapter_fingerprint, base_fingerprints, folder_fingerprint
from loraplus_hydra.models.patterns import refuse_slow_patterns
from loraplus_hydra.models.properties import is_classifier, label_names, mark_new_layers, positions
from loraplus_hydra.models.tokenizer import load_tokenizer, new_token_ids
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.stored_config import KEY
from loraplus_hydra.tasks.base import Base
from loraplus_hydra.tasks.examples import Examples
from loraplus_hydra.training.forgetting import OtherText
from loraplus_hydra.training.prepare import load_adapted_model


def load_run(
    run: FinishedRun, *, trainable: bool = False, other: OtherText | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the run's model with its adapter and its tokenizer.

    The base model's loss on `other` is measured before the adapter is added. Raises UserError.
    """
    quiet_loading()
    stored = stored_adapter(str(run.adapter), key=KEY)
    tokenizer = load_run_tokenizer(run)
    # Rows of new tokens and a new head are first drawn at random; then the adapter's values replace all of them.
    set_seed(run.config.seed)
    base = load_base(run.config, tokenizer, run.model_arguments())
    mark_new_layers(base, run.config)
    base.config.use_cache = True
    interrupts.stop_if_asked()
    if other is not None:
        other.measure_base(base, run.config)
    if changes_base(getattr(stored.config, "init_lora_weights", None)):
        model = _on_changed_base(base, run, tokenizer)
    else:
        model = attach(base, stored, trainable=trainable)
    # Last, because all files are on this machine now, and an adapter that doesn't fit the model is reported first.
    refuse_changed_run(run)
    model.eval()
    return model, tokenizer


def load_start(
    run: FinishedRun, tokenizer: PreTrainedTokenizerBase, examples: Examples, other: OtherText | None = None
) -> PeftModel:
    """Load the model as it was before training, with tensors of the names and shapes of the run's adapter.

    The base model's loss on `other` is measured before the adapter is added. Raises UserError.
    """
    quiet_loading()
    stored, adapter = stored_adapter(str(run.adapter), key=KEY), run.config.adapter
    if path := adapter.get("path"):
        now = {"adapter.path": adapter_fingerprint(path)}
        if not run.allow_changed_inputs:
            refuse_changed(run.result.get("inputs") or {}, now)
    start = None if path else adapter.get("init_lora_weights")
    if start == EVA or (changes_base(start) and run.step is None):
        # It is stored as a plain LoRA of other ranks for the original base, which such a LoRA doesn't change at first
        set_seed(run.config.seed)
        base = load_base(run.config, tokenizer, run.model_arguments())
        if other is not None:
            other.measure_base(base, run.config)
        refuse_slow_patterns(stored.config, base)
        stored.config.inference_mode = False
        with quiet_peft():
            model = get_peft_model(base, stored.config)
        assert isinstance(model, PeftModel)
    else:
        model = load_adapted_model(run.config, tokenizer, examples, other)
    refuse_changed_run(run)
    return model


def _on_changed_base(base: PreTrainedModel, run: FinishedRun, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Return the model of a checkpoint whose initialisation changed the base.

    The initialisation is repeated, as in `resume`. A final adapter fits the original base instead.
    """
    if run.step is None:
        what = "the adapter fits only a base that its initialisation changed, but runs don't store this base"
        raise ConfigErrors([Problem(KEY, what, "use another run")])
    new_tokens, config = new_token_ids(tokenizer, run.config.model), run.config
    model = add_adapter(base, config.adapter, config.task.task_type, new_tokens=new_tokens)
    load_tensors(model, run.adapter)
    return model


def refuse_changed_run(run: FinishedRun) -> None:
    """Raise ConfigErrors if the base weights or the run's stored adapter have changed.

    If the run is so old that it stored no fingerprints, only a note is shown.
    """
    then: dict[str, str] = run.result.get("inputs") or {}
    if run.allow_changed_inputs:
        return
    if not then:
        print(f"Note: {NOT_STORED}", file=sys.stderr)  # not on stdout, which has the answers
        return
    now = base_fingerprints(run.config.model)
    if stored := then.get(run.adapter.name):
        then, now = {**then, "adapter": stored}, now | {"adapter": folder_fingerprint(run.adapter)}
    refuse_changed(then, now)


def load_run_tokenizer(run: FinishedRun) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with the run's adapter."""
    model = run.config.model.copy()
    model.tokenizer, model.add_tokens, model.pad_token = str(run.adapter.absolute()), [], None
    return load_tokenizer(model)


def base_of(run: FinishedRun) -> Base:
    """Return the properties of the run's weights, which other rows must fit."""
    places = positions(run.config.model, run.config.task.auto_class)
    id2label = run.model_arguments().get("id2label", {}) if is_classifier(run.config) else {}
    labels = label_names(id2label)
    unnamed = 0 if labels else len(id2label)
    return Base(labels=labels, head="the run", unnamed_outputs=unnamed, positions=places)
