"""Keys, options and flags as users of other tools type them: one list that names the override for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.plain import flat
from loraplus_hydra.config.schema import RunConfig
from loraplus_hydra.config.synonyms import CHOICES, KEYS, NUMBERS, OPTIONS, PATHS, SUFFIXES, SWITCHES
from tests.conftest import Finished

TYPED: dict[str, dict[str, str]] = {
    "axolotl": {
        "base_model=meta-llama/Llama-3.2-1B": "model=hub model.path=meta-llama/Llama-3.2-1B",
        "datasets=train.csv": "data=csv data.train=train.csv",
        "sequence_len=2048": "task.args.max_length=2048",
        "lora_r=8": "adapter.r=8",
        "lora_target_linear=true": "adapter.target_modules=all-linear",
        "micro_batch_size=2": "trainer.per_device_train_batch_size=2",
        "num_epochs=3": "trainer.num_train_epochs=3",
        "optimizer=adamw_bnb_8bit": "optimizer=adamw8bit",
        "lr_scheduler=cosine": "scheduler=cosine",
        "val_set_size=0.1": "data.eval_fraction=0.1",
        "load_in_4bit=true": "quantization=nf4",
        "sample_packing=true": "task.args.packing=true",
        "wandb_project=mine": "logger=wandb logger.project=mine",
        "output_dir=out": "hydra.run.dir=out",
    },
    "LLaMA-Factory": {
        "model_name_or_path=gpt2": "model=gpt2",
        "stage=sft": "task=sft",
        "finetuning_type=lora": "adapter=lora",
        "lora_rank=8": "adapter.r=8",
        "lora_target=[q_proj]": "adapter.target_modules=[q_proj]",
        "additional_target=[lm_head]": "+adapter.modules_to_save=[lm_head]",
        "dataset=alpaca.json": "data=jsonl data.train=alpaca.json",
        "cutoff_len=512": "task.args.max_length=512",
        "quantization_bit=4": "quantization=nf4",
        "loraplus_lr_ratio=16": "loraplus.ratio=16",
        "use_rslora=true": "adapter=rslora",
        "report_to=wandb": "logger=wandb",
        "adapter_name_or_path=out/run": "adapter=existing adapter.path=out/run",
    },
    "TRL and PEFT": {
        "learning_rate=1e-4": "optimizer.lr=1e-4",
        "optim=adamw_torch": "optimizer=adamw",
        "dataset_name=owner/rows": "data=hub data.name=owner/rows",
        "attn_implementation=sdpa": "model.attention=sdpa",
        "torch_dtype=bfloat16": "model.dtype=bfloat16",
        "bf16=true": "trainer.bf16=true",
        "gradient_accumulation_steps=4": "trainer.gradient_accumulation_steps=4",
        "target_modules=[q_proj]": "adapter.target_modules=[q_proj]",
        "task_type=SEQ_CLS": "task=classification",
        "load_best_model_at_end=true": "+trainer.load_best_model_at_end=true",
        "push_to_hub=true": "publish the adapter/ folder yourself",
    },
    "options": {
        "model=Qwen/Qwen3-0.6B": "model=hub model.path=Qwen/Qwen3-0.6B",
        "data=book.txt": "task=text data=text data.train=book.txt",
        "optimizer=AdamW": "optimizer=adamw",
        "scheduler=linear_with_warmup": "scheduler=linear",
        "loraplus=16": "loraplus.ratio=16",
        "trainer=cuda": "trainer=gpu",
        "task=kto": "experiment=kto",
        "quantization=int4": "quantization=nf4",
    },
    "keys in other groups": {
        "trainer.epochs=3": "trainer.num_train_epochs=3",
        "adapter.lora_r=8": "adapter.r=8",
        "lora.rank=8": "adapter.r=8",
        "training_args.learning_rate=1": "optimizer.lr=1",
        "model.torch_dtype=bfloat16": "model.dtype=bfloat16",
        "scheduler.warmup_steps=5": "scheduler.num_warmup_steps=5",
    },
    "flags": {
        "--lr 1e-4": "optimizer.lr=1e-4",
        "--lora_r=8": "adapter.r=8",
        "--model_name_or_path meta-llama/Llama-3": "model=hub model.path=meta-llama/Llama-3",
        "--bf16": "trainer.bf16=true",
        "--optimizer.lr -1e-4": "optimizer.lr=-1e-4",
        "lora_alpha=16": "adapter.lora_alpha=16",
    },
    "spaces": {
        "seed = 3": "seed=3",
        "epochs =3": "trainer.num_train_epochs=3",
        "loraplus.ratio= 4": "loraplus.ratio=4",
        "lr: 1e-4": "optimizer.lr=1e-4",
        "rows.jsonl": "data=jsonl data.train=rows.jsonl",
    },
}


@pytest.mark.parametrize("tool", TYPED)
def test_each_name_leads_to_the_override_that_is_meant(tool: str, cli: Callable[..., Finished], tmp_path: Path) -> None:
    ended = cli(*(word for typed in TYPED[tool] for word in typed.split()))
    assert ended.status == 1
    lines = ended.err.splitlines()
    for typed, meant in TYPED[tool].items():
        named = typed.split("=")[0].split(" ")[0].rstrip(":")
        own = [line for line in lines if line.startswith(f"  - {named}")]
        assert [line.endswith((f"write {meant}", f"; {meant}")) for line in own] == [True], (typed, ended.err)
    assert list(tmp_path.iterdir()) == []


def test_words_of_other_commands_are_explained_by_their_usage(cli: Callable[..., Finished]) -> None:
    assert "for example: predict RUN text=..." in cli("predict", "run", "hello there").err
    assert "for example: export RUN [target=vllm] [merge=false]" in cli("export", "run", "out").err
    assert "--text: there is no such flag; write text=hi" in cli("predict", "run", "--text", "hi").err
    assert "lr: there is no such key; write optimizer.lr=1" in cli("resume", "run", "lr=1").err
    assert "use your own YAML as an option of a group" in cli("mine.yaml").err


def test_every_suggested_key_and_option_exists() -> None:
    folder = config_folder()
    options = {f"{file.parent.name}={file.stem}" for file in folder.glob("*/*.yaml")}
    keys = {"seed", "hydra.run.dir", *flat(OmegaConf.to_container(OmegaConf.structured(RunConfig)))}  # type: ignore[arg-type]
    for file in folder.glob("*/*.yaml"):
        plain: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        keys |= {f"{file.parent.name}.{key}" for key in flat(plain)}
    suggested = [key for meant in KEYS.values() for key in meant]
    for overrides in (*OPTIONS.values(), *PATHS.values(), *SUFFIXES.values(), *SWITCHES.values(), *NUMBERS.values()):
        for word in overrides.split():
            if "." in word.partition("=")[0]:
                suggested.append(word.partition("=")[0])
            else:
                assert word in options, word
    assert [key for key in suggested if not key.startswith("+") and key not in keys] == []
    assert {f"{group}=" for group in CHOICES.values()} <= {f"{option.partition('=')[0]}=" for option in options}
