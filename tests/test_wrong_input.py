"""Every mistake is told before anything heavy: the right words, exit status 1, no traceback, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished

# What is typed on top of a good run, and what must be said of it: the key, and what is wrong or right.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "group": (["optimizr=adamw"], ["optimizr", "did you mean 'optimizer'"]),
    "option": (["optimizer=adamw8bits"], ["optimizer", "no option 'adamw8bits'", "did you mean 'adamw8bit'"]),
    "key": (["trainer.max_stepz=3"], ["trainer.max_stepz", "did you mean 'max_steps'"]),
    "key behind a plus": (["+trainer.max_stepz=3"], ["trainer.max_stepz", "no such field", "did you mean 'max_steps'"]),
    "root key behind a plus": (["+seeed=3"], ["seeed", "did you mean 'seed'"]),
    "model key behind a plus": (["+model.revison=main"], ["model.revison", "did you mean 'revision'"]),
    "adapter key behind a plus": (["+adapter.lora_aplha=3"], ["adapter.lora_aplha", "did you mean 'lora_alpha'"]),
    "data key behind a plus": (["+data.trian=x"], ["data.trian", "did you mean 'train'"]),
    "scheduler key behind a plus": (["+scheduler.num_cycle=3"], ["scheduler", "num_cycle"]),
    "plus where none belongs": (["+seed=3"], ["+seed=3", "is in the config already", "seed=3"]),
    "type": (["seed=one"], ["seed", "'one' is not a whole number"]),
    "type in an open group": (["trainer.max_steps=many"], ["trainer.max_steps", "'many'", "a whole number"]),
    "text for a rate": (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "a finite number above 0"]),
    "missing value": (["optimizer.lr=???"], ["optimizer.lr", "is not set"]),
    "missing environment variable": (
        ["model.revision=${oc.env:NO_SUCH_VARIABLE}"],
        ["model.revision", "NO_SUCH_VARIABLE"],
    ),
    "interpolation to nowhere": (["seed=${nowhere.at.all}"], ["seed", "leads nowhere"]),
    "unknown class": (["optimizer._target_=torch.optim.AdamX"], ["optimizer._target_", "did you mean 'Adam"]),
    "unknown package": (["optimizer._target_=tourch.optim.AdamW"], ["optimizer._target_", "no package 'tourch'"]),
    "no class at all": (["optimizer._target_=adamw"], ["optimizer._target_", "no dotted path"]),
    "class that is no optimizer": (
        ["optimizer._target_=torch.nn.Linear"],
        ["optimizer", "Linear", "torch.optim.Optimizer"],
    ),
    "function that executes": (["optimizer._target_=os.system"], ["optimizer._target_", "os.system"]),
    "data function that executes": (["data._target_=os.system"], ["data._target_", "os.system"]),
    "data function of torch": (["data._target_=torch.load"], ["data._target_", "torch.load"]),
    "target where nothing is built": (["+model._target_=os.system"], ["model._target_"]),
    "nested target": (["+adapter.loftq_config={_target_: os.system}"], ["adapter.loftq_config._target_", "os.system"]),
    "class that is no trainer": (["task._target_=torch.optim.AdamW"], ["task._target_", "transformers.Trainer"]),
    "class that is no adapter": (["adapter._target_=torch.optim.AdamW"], ["adapter._target_", "PEFT config"]),
    "argument the optimizer doesn't take": (
        ["+optimizer.beta=3"],
        ["optimizer", "no argument 'beta'", "did you mean 'betas'"],
    ),
    "LBFGS": (["optimizer._target_=torch.optim.LBFGS"], ["LBFGS", "one parameter group only"]),
    "torch's Adafactor": (["optimizer._target_=torch.optim.Adafactor"], ["Adafactor", "scales each update"]),
    "Adafactor with relative steps": (["optimizer=adafactor", "optimizer.relative_step=true"], ["relative_step"]),
    "second master of the rate": (["+trainer.learning_rate=1"], ["trainer.learning_rate", "optimizer.lr"]),
    "second master of the optimizer": (["+trainer.optim=adamw_torch"], ["trainer.optim", "optimizer group"]),
    "second master of the seed": (["+trainer.seed=1"], ["trainer.seed", "its one master is seed"]),
    "second master of the folder": (["+trainer.output_dir=x"], ["trainer.output_dir", "hydra.run.dir"]),
    "second master of the warm-up": (
        ["+trainer.warmup_steps=5"],
        ["trainer.warmup_steps", "scheduler.num_warmup_steps"],
    ),
    "argument of this trainer alone": (["+trainer.max_length=5"], ["trainer.max_length", "task.args.max_length"]),
    "argument of every trainer": (["+task.args.max_steps=5"], ["task.args.max_steps", "trainer.max_steps"]),
    "rank 0": (["adapter.r=0"], ["adapter.r", "0 is out of range", "from 1 on"]),
    "dropout 1": (["adapter.lora_dropout=1"], ["adapter.lora_dropout", "below 1"]),
    "ratio 0": (["loraplus.ratio=0"], ["loraplus.ratio", "0 is out of range"]),
    "negative ratio": (["loraplus.ratio=-3"], ["loraplus.ratio", "-3 is out of range"]),
    "ratio NaN": (["loraplus.ratio=nan"], ["loraplus.ratio", "nan is out of range"]),
    "ratio null": (["loraplus.ratio=null"], ["loraplus.ratio", "null is out of range"]),
    "rate inf": (["optimizer.lr=inf"], ["optimizer.lr", "inf is out of range"]),
    "rate 0": (["optimizer.lr=0"], ["optimizer.lr", "0 is out of range"]),
    "negative weight decay": (["optimizer.weight_decay=-0.1"], ["optimizer.weight_decay", "from 0 on"]),
    "no step": (["trainer.max_steps=0"], ["trainer.max_steps", "from 1 on"]),
    "no batch": (["trainer.per_device_train_batch_size=0"], ["trainer.per_device_train_batch_size", "from 1 on"]),
    "ratio of a preset without one": (["loraplus=none", "loraplus.ratio=16"], ["loraplus.ratio", "no such key"]),
    "the same behind a plus": (
        ["loraplus=none", "+loraplus.ratio=16"],
        ["loraplus.ratio", "no rule of this preset uses it"],
    ),
    "unknown role in a rule": (
        ["+loraplus.extra_rules.x={role: lora_C, lr: 1}"],
        ["extra_rules.x.role", "did you mean 'lora_"],
    ),
    "rule that matches nothing": (
        ["+loraplus.extra_rules.x={pattern: scroe, lr: 1}"],
        ["extra_rules.x", "no trained tensor"],
    ),
    "ratio that does nothing": (["loraplus.rules.groupB=null"], ["ratio 8 does nothing", "loraplus=none"]),
    "file not there": (["data.train=nowhere.jsonl"], ["data.train", "nowhere.jsonl", "No such file"]),
    "folder not there": (["model.path=./nowhere"], ["model.path", "nowhere"]),
    "target modules": (["adapter.target_modules=[query]"], ["adapter.target_modules", "query", "q_proj", "all-linear"]),
    "dtype": (["model.dtype=float17"], ["model.dtype", "float17", "bfloat16"]),
    "unreadable value": (["optimizer.lr=[1"], ["optimizer.lr=[1", "can't be read"]),
    "no override": (["chek"], ["chek", "neither a command nor key=value"]),
    "trainer fields that contradict": (
        ["+trainer.load_best_model_at_end=true", "trainer.eval_strategy=no"],
        ["trainer"],
    ),
    "schedule that breaks the ratio": (
        ["scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "+scheduler.max_lr=0.1"],
        ["scheduler", "breaks the ratio", "one_cycle"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_told_and_leaves_nothing_behind(
    mistake: str, tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    overrides, said = MISTAKES[mistake]
    finished = cli(*tiny_run, *overrides)
    assert finished.status == 1
    assert "Traceback" not in finished.out + finished.err
    for words in said:
        assert words in finished.err
    assert list(tmp_path.iterdir()) == []


def test_every_mistake_is_told_at_once(tiny_run: list[str], cli: Callable[..., Finished]) -> None:
    finished = cli(
        *tiny_run, "adapter.r=0", "loraplus.ratio=-1", "+trainer.seed=3", "optimizer._target_=torch.nn.Linear"
    )
    for key in ("adapter.r", "loraplus.ratio", "trainer.seed", "optimizer._target_"):
        assert f"- {key}: " in finished.err
    assert "4 things to put right" in finished.err


def test_every_override_that_does_not_compose_is_told_at_once(cli: Callable[..., Finished]) -> None:
    finished = cli("optimizr=adamw", "seed=x", "loraplus=foo", "+optimizer.lr=3")
    assert finished.status == 1
    for words in ("optimizr", "seed: 'x'", "no option 'foo'", "+optimizer.lr=3"):
        assert words in finished.err


def test_broken_json_is_told_with_its_line(tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n{not json}\n", encoding="utf-8")
    finished = cli(*tiny_run, f"data.train={broken}")
    assert finished.status == 1
    assert "line 2" in finished.err
    assert "data.train" in finished.err


def test_empty_file_is_told(tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    finished = cli(*tiny_run, f"data.train={empty}")
    assert finished.status == 1
    assert "has no rows" in finished.err


def test_missing_column_is_told_with_those_that_are_there(tiny_run: list[str], cli: Callable[..., Finished]) -> None:
    finished = cli(*tiny_run, "data.prompt_column=question")
    assert finished.status == 1
    assert "data.prompt_column" in finished.err
    for column in ("'question'", "prompt", "completion"):
        assert column in finished.err


def test_used_run_folder_is_refused_and_left_alone(
    tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep me")
    finished = cli(*tiny_run, f"hydra.run.dir={folder}")
    assert finished.status == 1
    assert "isn't empty" in finished.err
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


def test_run_folder_that_is_a_file_is_refused(
    tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("keep me")
    finished = cli(*tiny_run, "hydra.run.dir=file")
    assert finished.status == 1
    assert "is a file" in finished.err
    assert (tmp_path / "file").read_text() == "keep me"
