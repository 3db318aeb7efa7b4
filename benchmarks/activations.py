"""The estimate of a step's memory beside the peak that torch's profiler measures.

    python -m benchmarks.activations

Both sides use the same rows: the longest ones of the run. The measured side is the run's own Trainer with weights, in
its second step.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.step import processor
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import ModelConfig, register, run_of
from loraplus_hydra.io.result import versions
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.hf_trainer.step_memory import EMBEDDED, longest_rows, packed_to, step_bytes
from loraplus_hydra.training.hf_trainer.temporary import temporary_state
from loraplus_hydra.training.prepare import Prepared, prepare


def make_model(name: str, sizes: dict[str, Any], folder: Path) -> Path:
    """Write a model with random weights and the built-in tokenizer."""
    tokenizer = load_tokenizer(OmegaConf.structured(ModelConfig(path=EMBEDDED)))
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **sizes, **ids)
    auto = AutoModelForSequenceClassification if name == "roberta" else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def make_rows(count: int, file: Path) -> Path:
    """Write texts of different lengths with two labels."""
    draw = random.Random(0)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(("text", "label"))
        for place in range(count):
            writer.writerow((" ".join(["return self"] * draw.randint(5, 200)), "even" if place % 2 else "odd"))
    return file


def composed(overrides: list[str]) -> DictConfig:
    """Return a run's config."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        return run_of(compose("config", overrides=overrides))


def measured_bytes(prepared: Prepared) -> int:
    """Return the peak of tensor bytes in the second step, without those from before the step."""
    config = prepared.config.copy()
    with open_dict(config):
        config.trainer.update(eval_strategy="no", save_strategy="no")
    rows = longest_rows(prepared.examples.train, config.trainer.per_device_train_batch_size, tokens=packed_to(config))
    with temporary_state(), tempfile.TemporaryDirectory() as folder:
        examples = replace(prepared.examples, train=rows)
        trainer = make_trainer(replace(prepared, config=config, examples=examples), Path(folder))
        if trainer.args.activation_checkpointing:
            trainer.model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        model = trainer.accelerator.prepare_model(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        batches, items = trainer.get_batch_samples(
            iter([batch] * trainer.args.gradient_accumulation_steps), trainer.args.gradient_accumulation_steps, "cpu"
        )

        def step() -> None:
            for each in batches:
                trainer.training_step(model, dict(each), items)

        step()  # compares both forwards, and fills caches
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def compare(overrides: list[str]) -> tuple[int, int]:
    """Return the estimated and the measured bytes of a step."""
    prepared = prepare(composed(overrides))
    return step_bytes(prepared.config, prepared.tokenizer, prepared.examples), measured_bytes(prepared)


def table(results: dict[str, dict[str, int]]) -> str:
    """Return the measurements as a Markdown table."""
    lines = ["| step | estimated, MiB | measured, MiB | ratio |", "|---|---:|---:|---:|"]
    for name, one in results.items():
        mib = [one[side] / 2**20 for side in ("estimated", "measured")]
        lines.append(f"| {name} | {mib[0]:.1f} | {mib[1]:.1f} | {mib[0] / mib[1]:.3f} |")
    return "\n".join(lines)


def overrides_of(model: str, words: list[str], config: Any, folder: Path) -> list[str]:
    """Return the overrides of one setting.

    The model's files are written into `folder` if they are missing.
    """
    words = [*config.shared, *words]
    if model == "embedded":
        return words
    place = folder / model
    if not place.exists():
        make_model(model, dict(config.models[model]), place)
    words = ["model=hub", f"model.path={place}", *words]
    if model != "roberta":
        return words
    rows = make_rows(config.rows, folder / "rows.csv")
    return ["task=classification", "data=csv", f"data.train={rows}", f"data.eval={rows}", *words]


def main() -> None:
    config = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(sys.argv[1:]))
    torch.set_num_threads(config.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, *words) in config.settings.items():
            estimated, measured = compare(overrides_of(model, words, config, Path(folder)))
            results[str(name)] = {"estimated": estimated, "measured": measured}
            print(f"{name}: {estimated / measured:.3f}", flush=True)
    told = {"versions": versions(), "processor": processor("cpu"), "results": results}
    Path(config.out).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
