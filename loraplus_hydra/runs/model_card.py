"""The model card of an exported model or adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from loraplus_hydra.config.locations import is_local, model_location
from loraplus_hydra.config.plain import plain_of, without_credentials
from loraplus_hydra.config.types import fits
from loraplus_hydra.io import files, run_folder
from loraplus_hydra.io.read import Unreadable, read_json
from loraplus_hydra.io.result import recorded
from loraplus_hydra.io.text import code, code_block, markdown
from loraplus_hydra.loraplus.memory import HEADS
from loraplus_hydra.models.adapter_files import stored_adapter
from loraplus_hydra.models.quantization import is_quantized
from loraplus_hydra.runs.finished import FinishedRun, model_metrics

_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
# What the card needs of each row of param_groups.json
_ROW = {"group": str, "lr": float, "weight_decay": float, "shape": list[int]}


def write_card(run: FinishedRun, folder: Path, *, merged: bool, check: str = "", serving: str = "") -> None:
    """Write README.md into `folder`. `check` is the text about the export's comparison with the run.

    `serving` is the section on the program that the export is for.

    The card's numbers are copied from result.json and param_groups.json without rounding. Raises UserError.
    """
    files.write_text(folder / "README.md", card(run, merged=merged, check=check, serving=serving))


def card(run: FinishedRun, *, merged: bool, check: str = "", serving: str = "") -> str:
    """Return the card's text. Raises UserError if param_groups.json can't be read.

    Values that result.json doesn't have are left out.
    """
    config = plain_of(run.config)
    result = recorded(run.result)
    parts = [
        _front_matter(run, merged=merged),
        *_introduction(run, merged=merged),
        "## How to load it",
        _loading(run, merged=merged),
        *filter(None, (check, serving)),
        "## Data",
        "\n".join(f"- {code(str(key))}: {_shown(value)}" for key, value in config["data"].items() if value is not None),
        "## LoRA+",
        "Each group of trained tensors had its own rate (at the schedule's peak):",
        _table(("group", "lr", "weight decay", "tensors", "parameters"), _group_rows(_groups(run))),
        "## Results",
        _table(("metric", "before training", "after training"), _metric_rows(result)),
        " ".join(_effort(run, result)),
        *_samples(result.get("samples", [])),
        "## Config",
        f"Hash of the config: {code(result.get('config_hash') or 'not recorded')}",
        code_block(OmegaConf.to_yaml(OmegaConf.create(_published(config))), "yaml"),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items()) or "not recorded",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(run: FinishedRun, *, merged: bool) -> str:
    base = _base_name(run)
    fields: dict[str, Any] = {"library_name": "transformers" if merged else "peft", "tags": ["lora", "lora-plus"]}
    if not is_local(model_location(run.config.model.path)):
        fields = {"base_model": base, "base_model_relation": "finetune" if merged else "adapter", **fields}
    if pipeline := _PIPELINES.get(str(run.config.task.task_type)):
        fields["pipeline_tag"] = pipeline
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create(fields))}---"


def _introduction(run: FinishedRun, *, merged: bool) -> Iterator[str]:
    what = "merged model" if merged else "adapter"
    yield f"# {markdown(_base_name(run))} with {markdown(_method(run))}, trained with LoRA+"
    quantised = is_quantized(run.config.quantization)
    base = code(_base_name(run)) + (
        f", revision {code(run.config.model.revision)}" if run.config.model.revision else ""
    )
    yield (
        f"This {what} was trained on {base}{' (quantised)' if quantised else ''} with LoRA+ ([arXiv "
        "2402.12354](https://arxiv.org/abs/2402.12354)): lora_B had a larger learning rate than lora_A."
    )
    if merged and quantised:
        yield "Its weights are the dequantised weights on which the adapter was trained, plus the adapter's update."


def _loading(run: FinishedRun, *, merged: bool) -> str:
    """Return Python code that loads and runs the export."""
    auto = str(run.config.task.auto_class).rpartition(".")[2]
    lines = [f"from transformers import {auto}, AutoTokenizer", "", 'folder = "<this folder>"']
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    if merged:
        lines.append(f"model = {auto}.from_pretrained(folder)")
    else:
        lines = ["from peft import PeftModel", *lines, *_loading_adapter(run, auto)]
    if run.config.task.task_type == "CAUSAL_LM":
        lines.append('answer = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)')
        lines.append("print(tokenizer.decode(answer[0]))")
    elif run.config.task.task_type == "SEQ_CLS":
        lines.append('scores = model(**tokenizer("A text", return_tensors="pt")).logits[0]')
        lines.append("print({model.config.id2label[i]: score.item() for i, score in enumerate(scores)})")
    return "\n".join(["```python", *lines, "```"])


def _loading_adapter(run: FinishedRun, auto: str) -> Iterator[str]:
    base = json.dumps(_base_name(run))
    revision = f", revision={json.dumps(run.config.model.revision)}" if run.config.model.revision else ""
    options = revision + ("" if run.config.model.dtype == "auto" else f", dtype={json.dumps(run.config.model.dtype)}")
    if run.config.model.path.startswith("pkg://"):
        yield "from loraplus_hydra.config.locations import model_location"
        base = f"model_location({base})"
    if is_quantized(run.config.quantization):
        yield "from transformers import BitsAndBytesConfig"
        yield f"quantization = BitsAndBytesConfig(**{_quantization_arguments(run)})"
        options += ", quantization_config=quantization"
    if run.config.task.task_type == "SEQ_CLS":  # the adapter's config.json has the names of the labels
        yield "from transformers import AutoConfig"
        yield "config = AutoConfig.from_pretrained(folder)"
        if run.config.model.add_tokens:  # with the rows of the new tokens, the base's embedding would be drawn anew
            yield f"config.vocab_size = AutoConfig.from_pretrained({base}{revision}).vocab_size"
        if is_quantized(run.config.quantization):  # with it, the base's weights would be read as quantised ones
            yield "del config.quantization_config"
        yield f"model = {auto}.from_pretrained({base}, config=config, ignore_mismatched_sizes=True{options})"
    else:
        yield f"model = {auto}.from_pretrained({base}{options})"
    if run.config.model.add_tokens:
        # Many models have more rows than tokens, and the rows must not be removed.
        yield "rows = max(len(tokenizer), model.get_input_embeddings().num_embeddings)"
        yield "model.resize_token_embeddings(rows)  # for the new tokens"
    yield "model = PeftModel.from_pretrained(model, folder)"


def _quantization_arguments(run: FinishedRun) -> dict[str, Any]:
    given = OmegaConf.to_container(run.config.quantization, resolve=True)
    assert isinstance(given, dict)
    dtype = "float32" if run.config.model.dtype == "auto" else run.config.model.dtype
    arguments = {str(key): dtype if value == "auto" else value for key, value in given.items() if key != "_target_"}
    if run.config.task.task_type == "SEQ_CLS":  # the head was trained
        arguments.setdefault("llm_int8_skip_modules", list(HEADS))
    return arguments


def _groups(run: FinishedRun) -> list[dict[str, Any]]:
    """Return the rows of param_groups.json. Raises Unreadable."""
    file = run.folder / run_folder.PARAM_GROUPS
    rows: list[dict[str, Any]] = read_json(file, list)
    for row in rows:
        wrong = [name for name, kind in _ROW.items() if not (isinstance(row, dict) and fits(row.get(name), kind))]
        if wrong:
            raise Unreadable(f"{file} can't be read: a row has no valid '{wrong[0]}'")
    return rows


def _group_rows(groups: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for name in dict.fromkeys(row["group"] for row in groups):
        rows = [row for row in groups if row["group"] == name]
        yield name, rows[0]["lr"], rows[0]["weight_decay"], len(rows), sum(math.prod(row["shape"]) for row in rows)


def _metric_rows(result: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    before, after = result["metrics_before"], result["metrics"]
    for name in dict.fromkeys([*model_metrics(after), *model_metrics(before)]):
        yield name, before.get(name, ""), after.get(name, "")
    if result.get("train_loss") is not None:
        yield "train_loss (mean over the steps)", "", result["train_loss"]


def _effort(run: FinishedRun, result: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences about steps, time and parameters. Values that the run has not recorded are omitted."""
    if run.step is not None:
        yield f"This is the checkpoint of step {run.step}; the run may have been planned for more steps."
    texts = {"steps": "{} steps", "seed": "seed {}", "seconds": "{} s"}
    if facts := [text.format(result[name]) for name, text in texts.items() if name in result]:
        yield ", ".join(facts) + (f" on {result['device']}" if result.get("device") else "") + "."
    if result.get("total_parameters") and "trained_parameters" in result:
        yield f"{result['trained_parameters']} of {result['total_parameters']} parameters trained."


def _samples(samples: list[dict[str, str]]) -> Iterator[str]:
    if samples:
        yield "Held-out prompts:"
        columns = ("prompt", "reference", "before", "after")
        yield _table(columns, ([sample.get(column, "") for column in columns] for sample in samples))


def _table(columns: tuple[str, ...], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(markdown(str(cell)) for cell in line) + " |" for line in lines)


def _method(run: FinishedRun) -> str:
    config = stored_adapter(str(run.adapter), key="run").config
    name = re.sub("ra$", "RA", type(config).__name__.removesuffix("Config"))  # LoraConfig: LoRA, VeraConfig: VeRA
    start = run.config.adapter.get("init_lora_weights")
    initialisation = f" ({start})" if isinstance(start, str) else ""
    rank = f" of rank {config.r}" if name == "LoRA" else ""
    return f"{'DoRA' if getattr(config, 'use_dora', False) else name}{initialisation}{rank}"


def _base_name(run: FinishedRun) -> str:
    return str(_published(run.config.model.path))


def _shown(value: Any) -> str:
    return code(str(_published(value)))


def _published(value: Any) -> Any:
    """Return a config's value for publication.

    A local path is shortened to its last part. An address loses its user and password, and `file:` or `sqlite:` its
    path.
    """
    if isinstance(value, dict):
        return {_published(key): _published(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_published(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")):
        return Path(value).name
    scheme, mark, rest = value.partition("://")
    if not mark:
        return value
    if rest.startswith("/"):  # the address of a file
        return f"{scheme}:{Path(rest).name}"
    return without_credentials(value)
