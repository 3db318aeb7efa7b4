"""Finished runs of the tests of `export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra import run
from tests.support.architectures import checkpoint

CSV = "text,label\n" + "".join(f"say {word} {i},{word}\n" for i in range(8) for word in ("one", "two", "three"))

TEXT = ("task=text", "data.text_column=prompt", "task.block_size=16", "data.completion_column=null")

# Everything that changes how a model is put together again: architecture, then overrides.
RUNS: dict[str, tuple[str, list[str]]] = {
    "lora": ("llama", []),
    "dora": ("mistral", ["adapter=dora"]),
    "pissa": ("llama", ["adapter=pissa"]),
    "adalora": ("llama", ["adapter=adalora", "loraplus=roles", "adapter.deltaT=1", "trainer.max_steps=8"]),
    "vera": ("gemma", ["adapter=vera", "loraplus=roles"]),
    "embeddings, tied": ("gpt2", ["adapter=lora_embeddings", "loraplus.lr_embedding=1e-2"]),
    "embeddings, untied": ("llama", ["adapter=lora_embeddings", "loraplus.lr_embedding=1e-2"]),
    "new tokens, tied": ("qwen2", ["model.add_tokens=['<call>','<answer>']"]),
    "new tokens, untied": ("llama", ["model.add_tokens=['<call>','<answer>']"]),
    "biases": ("gpt2", ["adapter.bias=all"]),
    "output, tied": ("qwen2", [*TEXT, "adapter.target_modules=[q_proj,lm_head]"]),
    "output, untied": ("llama", [*TEXT, "adapter.target_modules=[q_proj,lm_head]"]),
    "embeddings and output, tied": ("qwen2", [*TEXT, "adapter.target_modules=[q_proj,embed_tokens,lm_head]"]),
    "embeddings and output, untied": ("llama", [*TEXT, "adapter.target_modules=[q_proj,embed_tokens,lm_head]"]),
    "saved output, tied": ("qwen2", [*TEXT, "+adapter.modules_to_save=[lm_head]"]),
    "saved output, untied": ("llama", ["+adapter.modules_to_save=[lm_head]"]),
    "saved embeddings, tied": ("qwen2", [*TEXT, "+adapter.modules_to_save=[embed_tokens]"]),
    "nf4": ("llama", ["quantization=nf4"]),
}

CLASSIFIERS: dict[str, tuple[str, list[str]]] = {
    "classifier": ("bert", []),
    "classifier, new tokens": ("bert", ["model.add_tokens=['<call>']"]),
    "classifier, nf4": ("llama", ["quantization=nf4"]),
}

# Their logits are rounded, so only their weights are compared.
ROUNDED: dict[str, tuple[str, list[str]]] = {
    "lora, bfloat16": ("llama", ["model.dtype=bfloat16"]),
    "pissa, bfloat16": ("llama", ["model.dtype=bfloat16", "adapter=pissa"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[[str], Path]:
    """The folder of a finished run of RUNS, or of a classifier, trained once a module."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register

    place = tmp_path_factory.mktemp("exported")

    def finished(name: str) -> Path:
        folder = place / name.replace(", ", "_") / "run"
        if folder.exists():
            return folder
        if name in CLASSIFIERS:
            (place / "labels.csv").write_text(CSV)
            architecture, more = CLASSIFIERS[name]
            overrides = ["task=classification", "data=csv", f"data.train={place / 'labels.csv'}", *more]
        else:
            architecture, overrides = (RUNS | ROUNDED)[name]
            overrides = ["data=jsonl", f"data.train={rows}", "task.samples=1", "task.sample_tokens=4", *overrides]
        base = checkpoint(architecture, folder.parent / "base")
        common = ["model=hub", f"model.path={base}", "trainer.max_steps=3", "optimizer.lr=5e-3"]
        register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            config = compose("config", overrides=[*common, *overrides])
        run(config, folder)
        return folder

    return finished
