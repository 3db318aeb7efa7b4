"""The check of a run's export for a target, before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PretrainedConfig
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import cached_file

from loraplus_hydra.config.locations import PACKAGE_SCHEME, model_location
from loraplus_hydra.config.targets import locate
from loraplus_hydra.errors import ConfigErrors, Problem, first_line, refuse
from loraplus_hydra.io.read import read_json
from loraplus_hydra.loraplus.peft_layers import LOFTQ
from loraplus_hydra.models.adapter_files import CONFIG, stored_adapter
from loraplus_hydra.models.base_model import hub_arguments, load_config
from loraplus_hydra.models.initialisation import changes_base
from loraplus_hydra.runs import ollama_template
from loraplus_hydra.runs.export_architectures import LLAMA_CPP_SENTENCEPIECE
from loraplus_hydra.runs.export_commands import Served
from loraplus_hydra.runs.export_targets import KEY, LLAMA_CPP, OLLAMA, Export, problems
from loraplus_hydra.runs.finished import FinishedRun
from loraplus_hydra.runs.load_finished import load_run_tokenizer

_EXAMPLE = f"{PACKAGE_SCHEME}loraplus_hydra."  # llama.cpp's converter doesn't know the built-in example's tokenizer


def check_target(run: FinishedRun, target: str, *, merged: bool) -> Served:
    """Return the export of `run` as `target` loads it. Raises ConfigErrors if it can't load it."""
    export = describe(run, merged=merged)
    try:
        found = problems(target, export)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # PEFT doesn't check the types of its fields
        what = f"{run.adapter / CONFIG} has a field of another type than PEFT writes: {first_line(error)}"
        raise ConfigErrors([Problem("run", what, "use another run")]) from error
    refuse(found)
    served = Served(target, run, export, load_run_tokenizer(run), _needed_file(run, target, export))
    if target == OLLAMA and served.chat and ollama_template.translated(served.tokenizer) is None:
        what = "the tokenizer's chat template can't be written as a TEMPLATE of Ollama"
        raise ConfigErrors([Problem(KEY, what, "use target=llama_cpp, which reads the chat template itself")])
    return served


def describe(run: FinishedRun, *, merged: bool) -> Export:
    """Return what decides whether a target can load the export of `run`. Reads only configs and a header."""
    stored = stored_adapter(str(run.adapter), key="run")
    model, task = run.config.model, run.config.task
    config = load_config(model, run.model_arguments())
    name, on_transformers = _class_of(config, locate(task.auto_class))
    return Export(
        merged=merged,
        task_type=None if task.task_type is None else str(task.task_type),
        architecture=name,
        base=config.get_text_config().to_dict(),
        adapter=_as_exported(read_json(stored.folder / CONFIG), run.config.adapter.get("init_lora_weights")),
        shapes=stored.shapes(),
        new_tokens=bool(model.add_tokens),
        has_sentencepiece=name not in LLAMA_CPP_SENTENCEPIECE or _sentencepiece(model) is not None,
        llama_cpp_tokenizer=not str(model.tokenizer or model.path).startswith(_EXAMPLE),
        transformers_backend=on_transformers,
    )


def _needed_file(run: FinishedRun, target: str, export: Export) -> Path | None:
    """Return the tokenizer.model that llama.cpp's converter needs, because transformers doesn't save it."""
    needed = target in (LLAMA_CPP, OLLAMA) and export.merged and export.architecture in LLAMA_CPP_SENTENCEPIECE
    return _sentencepiece(run.config.model) if needed else None


def _sentencepiece(model: DictConfig) -> Path | None:
    """Return the tokenizer.model of a run's tokenizer; None if there is none."""
    path = model.tokenizer or model.path
    found = cached_file(
        model_location(path),
        "tokenizer.model",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments(model, path),
    )
    return None if found is None else Path(found)


def _class_of(config: PretrainedConfig, auto_class: Any) -> tuple[str, bool]:
    """Return the name of the model's class, and True if vLLM can run it through transformers' code.

    The name is empty for a model with code of its own.
    """
    if not issubclass(auto_class, _BaseAutoModelClass):
        return auto_class.__name__, auto_class.is_backend_compatible()
    if type(config) not in auto_class._model_mapping:
        return "", True
    found = auto_class._model_mapping[type(config)]
    model = found[0] if isinstance(found, tuple) else found
    return model.__name__, model.is_backend_compatible()


def _as_exported(adapter: dict[str, Any], start: Any) -> dict[str, Any]:
    """Return a run's adapter_config.json in the form that the export has.

    `start` is the run's `adapter.init_lora_weights`. An adapter whose start changed the base is exported as a plain
    LoRA of twice the rank.
    """
    if start == LOFTQ:  # stored as true, because PEFT would quantise the base when it loads the adapter
        return {**adapter, "init_lora_weights": start}
    if not changes_base(adapter.get("init_lora_weights")):
        return adapter
    ranks = {name: 2 * rank for name, rank in (adapter.get("rank_pattern") or {}).items()}
    return {**adapter, "init_lora_weights": True, "r": 2 * adapter["r"], "rank_pattern": ranks}
