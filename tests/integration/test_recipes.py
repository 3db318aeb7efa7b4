"""Published recipes compose, are checked, and run two steps on a tiny model of their architecture, without network."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.check import check
from loraplus_hydra.config.locations import config_folder
from tests.integration.test_every_option import two_steps
from tests.support.architectures import config_of
from tests.support.tiny import write_jsonl

ARCHITECTURES = {"paper_roberta": "roberta", "paper_gpt2": "gpt2", "paper_llama": "llama", "metamathqa": "llama"}
# Numbers of the sources, copied from them for this test.
NUMBERS: dict[str, Mapping[str, Any]] = {
    "paper_roberta": {"optimizer.lr": 5e-5, "loraplus.ratio": 80, "adapter.r": 8, "adapter.lora_alpha": 8},
    "paper_gpt2": {"optimizer.lr": 2e-4, "loraplus.ratio": 10, "adapter.r": 8, "adapter.lora_alpha": 8},
    "paper_llama": {"adapter.r": 8, "adapter.lora_alpha": 16, "trainer.gradient_accumulation_steps": 4},
    "metamathqa": {
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.1,
        "adapter.r": 32,
        "adapter.lora_alpha": 64,
        "trainer.max_steps": 5000,
        "trainer.per_device_train_batch_size": 4,
        "task.args.max_length": 768,
    },
}


@pytest.fixture
def overrides(checkpoints: Callable[[str], Path], compose: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return overrides that give a recipe a tiny model, tiny rows and this machine's dtype."""

    def made(name: str) -> list[str]:
        words = [f"experiment={name}"]
        architecture = ARCHITECTURES[name]
        named = compose(*words).model.config
        tiny = config_of(architecture)
        words += [f"model.config.{key}={getattr(tiny, key)}" for key in named if key != "model_type"]
        words += [f"model.path={checkpoints(architecture)}", "model.dtype=float32"]
        if name == "metamathqa":
            rows = [{"prompt": "Question: 1 Think step by step.\nAnswer:", "completion": " one two"}] * 8
            return [*words, f"data.train={write_jsonl(tmp_path / 'rows.jsonl', rows)}", "data.eval_fraction=0.25"]
        folder = tmp_path / "MNLI"
        folder.mkdir()
        labels = ("entailment", "neutral", "contradiction")
        lines = [f"say one {number}\tsay two\t{labels[number % 3]}\n" for number in range(9)]
        for split in ("train", "dev_matched"):
            (folder / f"{split}.tsv").write_text("sentence1\tsentence2\tgold_label\n" + "".join(lines))
        return [*words, f"data.path={tmp_path}", "trainer.fp16=false"]

    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recipe_has_the_numbers_of_its_source(name: str, compose: Callable[..., Any]) -> None:
    from omegaconf import OmegaConf

    config = compose(f"experiment={name}")
    assert {key: OmegaConf.select(config, key) for key in NUMBERS[name]} == NUMBERS[name]
    assert config.adapter.init_lora_weights == (True if name == "metamathqa" else "a_zero")
    assert "https://" in (config_folder() / "experiment" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_number_of_a_recipe_names_its_source(name: str) -> None:
    """Each key of the run has a source in brackets, or says that the sources lack it."""
    text = (config_folder() / "experiment" / f"{name}.yaml").read_text()
    settings = re.findall(r"^( *\w+: [^#\n]+)#(.*)$", text.partition("- _self_")[2], flags=re.MULTILINE)
    assert len(settings) > 15
    known = re.compile(
        r"\[(script|arguments|code|default|adapter|utils|data|run)\]|config\.json|doesn't set it|not in the"
    )
    own = {"train: metamathqa.jsonl", "ratio: 1"} if name == "metamathqa" else set()
    assert [key for key, comment in settings if key.strip() not in own and not known.search(comment)] == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recipe_is_checked_and_runs_two_steps(
    name: str, overrides: Callable[[str], list[str]], compose: Callable[..., Any], tmp_path: Path
) -> None:
    words = overrides(name)
    check(compose(*words))
    short = ["trainer.max_steps=2", "trainer.eval_strategy=no", "task.samples=0"][: 3 if name == "metamathqa" else 2]
    two_steps(compose(*words, *short, "trainer.gradient_accumulation_steps=1"), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "jobs"), [("paper_llama", 5 * 7 * 2), ("metamathqa", 5)], ids=["paper_llama", "metamathqa"]
)
def test_ready_made_grid_has_the_recipes_settings(name: str, jobs: int) -> None:
    from math import prod

    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.config.schema import register

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        whole = hydra_compose("config", overrides=[f"hparams_search={name}"], return_hydra_config=True)
        alone = hydra_compose("config", overrides=[f"experiment={name}"])
    assert prod(len(str(values).split(",")) for values in whole.hydra.sweeper.params.values()) == jobs
    for group in ("model", "adapter", "task", "data", "trainer", "scheduler"):
        assert whole[group] == alone[group], group
    assert whole.optimizer.lr == alone.optimizer.lr
