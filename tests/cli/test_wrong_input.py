"""Every mistake is told before anything heavy: the right words, exit status 1, no traceback, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraplus_hydra.errors import first_line
from tests.conftest import Finished

# What is typed on top of a good run, and what must be said of it: the key, and what is wrong or right.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "bare keys": (
        ["lr=1e-4", "r=16", "epochs=3", "batch_size=4", "max_steps=10", "learning_rate=2e-4", "ratio=4", "alpha=32"],
        [
            "lr: there is no such key; write optimizer.lr=1e-4",
            "r: there is no such key; write adapter.r=16",
            "epochs: there is no such key; write trainer.num_train_epochs=3",
            "batch_size: there is no such key; write trainer.per_device_train_batch_size=4",
            "max_steps: there is no such key; write trainer.max_steps=10",
            "learning_rate: there is no such key; write optimizer.lr=2e-4",
            "ratio: there is no such key; write loraplus.ratio=4",
            "alpha: there is no such key; write adapter.lora_alpha=32",
        ],
    ),
    "names of other tools, in a group": (
        ["optimizer.learning_rate=1e-4", "adapter.dropout=0.1", "trainer.lr=3", "optimizer.max_steps=5"],
        [
            "optimizer.learning_rate: there is no such key; write optimizer.lr=1e-4",
            "adapter.dropout: there is no such key; write adapter.lora_dropout=0.1",
            "trainer.lr: there is no such key; write optimizer.lr=3",
            "optimizer.max_steps: there is no such key; write trainer.max_steps=5",
        ],
    ),
    "function of a schedule that declares nothing": (
        ["scheduler._target_=tests.support.undeclared.schedule"],
        ["scheduler._target_", "doesn't declare what it returns; add `-> LRScheduler` to it"],
    ),
    "function of data that declares nothing": (
        ["data._target_=tests.support.undeclared.rows"],
        ["data._target_", "add `-> datasets.DatasetDict` to it"],
    ),
    "function of examples that declares nothing": (
        ["task.examples=tests.support.undeclared.examples"],
        ["task.examples", "add `-> Examples` to it"],
    ),
    "loss that TRL looks up late": (
        ["+task.args.loss_type=no"],
        ["task.args.loss_type: there is no 'no'; use one of nll, dft"],
    ),
    "token of TRL's that the tokenizer lacks": (
        ["+task.args.pad_token=steps"],
        ["task.args.pad_token: the tokenizer has no token 'steps'"],
    ),
    "argument that an optimizer refuses in its first step": (
        ["optimizer=muon", "+optimizer.ns_steps=200"],
        ["optimizer: Muon can't take a step with these arguments: Number of steps must be less than 100"],
    ),
    "metric that no evaluation has": (
        ["task.metric=eval_accuracy"],
        ["task.metric: SFTTrainer can't train with this argument", "'eval_accuracy', which is not found"],
    ),
    "kind of 4-bit weights": (
        ["quantization=nf4", "quantization.bnb_4bit_quant_type=nf5"],
        ["quantization.bnb_4bit_quant_type: there is no 'nf5' (did you mean 'nf4'?); use one of nf4, fp4"],
    ),
    "package of a quantisation": (
        ["quantization._target_=transformers.QuantoConfig"],
        ["quantization: Loading an optimum-quanto quantized model requires"],
    ),
    "method that needs more than rows": (
        ["adapter._target_=peft.PolyConfig", "~adapter.lora_alpha", "~adapter.lora_dropout", "~adapter.bias"],
        ["adapter._target_: PolyConfig needs a task_id in each row; use adapter=lora"],
    ),
    "level of the log": (["+trainer.log_level=no"], ["trainer.log_level: there is no level 'no'; use one of"]),
    "level of the log as a list": (["+trainer.log_level=[a]"], ["trainer.log_level"]),
    "name longer than a file's": ([f"adapter={'x' * 300}"], ["adapter", "no option"]),
    "home of an unknown user": (["data=jsonl", "data.train=~nobody_known/rows.jsonl"], ["data.train"]),
    "settings of a class as text": (
        ["+trainer.parallelism_config=x", "+adapter.monteclora_config=auto"],
        ["trainer.parallelism_config: 'x' is not a mapping", "adapter.monteclora_config: 'auto' is not a mapping"],
    ),
    "mode of the compiler": (
        ["trainer.torch_compile=true", "+trainer.torch_compile_mode=max_autotune"],
        ["trainer.torch_compile_mode: there is no 'max_autotune' (did you mean 'max-autotune'?)"],
    ),
    "compiler": (
        ["trainer.torch_compile=true", "+trainer.torch_compile_backend=inducto"],
        ["trainer.torch_compile_backend: there is no 'inducto' (did you mean 'inductor'?)"],
    ),
    "token that the vocabulary lacks": (
        ["+adapter.trainable_token_indices=[100000]"],
        ["adapter.trainable_token_indices: there is no token 100000; the vocabulary has ids from 0 to"],
    ),
    "rank above every dimension": (
        ["adapter.r=1000000"],
        ["adapter.r: 1000000 is far above the largest dimension of the adapted layers' weights,"],
    ),
    "model, file and optimizer at once": (
        ["model=hub", "model.path=./none", "data=jsonl", "data.train=./none.jsonl", "+optimizer.beta=1"],
        ["model.path: there is no folder", "data.train: ./none.jsonl: No such file", "no argument 'beta'"],
    ),
    "name of a sweep for one run": (
        ["sweep.name=mine"],
        ["sweep.name: names a sweep's folder, and this is a single run; name a run's folder with hydra.run.dir"],
    ),
    "qlora is two options": (["adapter=qlora"], ["no option 'qlora'; write adapter=lora quantization=nf4"]),
    "model on a hub in place of an option": (
        ["model=Qwen/Qwen3-0.6B"],
        ["no option 'Qwen/Qwen3-0.6B'; write model=hub model.path=Qwen/Qwen3-0.6B"],
    ),
    "file in place of an option": (["data=rows.jsonl"], ["'rows.jsonl'; write data=jsonl data.train=rows.jsonl"]),
    "group": (["optimizr=adamw"], ["optimizr", "did you mean 'optimizer'"]),
    "option": (["optimizer=adamw8bits"], ["optimizer", "no option 'adamw8bits'", "did you mean 'adamw8bit'"]),
    "key": (["trainer.max_stepz=3"], ["trainer.max_stepz", "did you mean 'max_steps'"]),
    "key behind a plus": (["+trainer.max_stepz=3"], ["trainer.max_stepz", "no such field", "did you mean 'max_steps'"]),
    "names of other tools behind a plus": (
        ["+epochs=3", "+adapter.lora_r=8", "+trainer.batch_size=4"],
        ["epochs: there is no such key; write trainer.num_train_epochs=3", "mean 'r'", "'per_device_train_batch_size'"],
    ),
    "root key behind a plus": (["+seeed=3"], ["seeed", "did you mean 'seed'"]),
    "model key behind a plus": (["+model.revison=main"], ["model.revison", "did you mean 'revision'"]),
    "adapter key behind a plus": (["+adapter.lora_aplha=3"], ["adapter.lora_aplha", "did you mean 'lora_alpha'"]),
    "data key behind a plus": (["+data.trian=x"], ["data.trian", "did you mean 'train'"]),
    "scheduler key behind a plus": (["+scheduler.num_cycle=3"], ["scheduler", "num_cycle"]),
    "plus where none belongs": (["+seed=3"], ["+seed=3", "is already in the config", "seed=3"]),
    "type": (["seed=one"], ["seed", "'one' is not a whole number"]),
    "type in an open group": (["trainer.max_steps=many"], ["trainer.max_steps", "'many'", "a whole number"]),
    "text for a rate": (["optimizer.lr=fast"], ["optimizer.lr: 'fast' is not a number; it must be a finite number"]),
    "text for a rank": (["adapter.r=abc"], ["adapter.r: 'abc' is not a whole number; it must be"]),
    "half a rank": (["adapter.r=2.5"], ["adapter.r: 2.5 is not a whole number; it must be a whole number from 1 on"]),
    "text for a list": (
        ["optimizer.betas=abc"],
        ["optimizer.betas: 'abc' is not a list of numbers; it must be two"],
    ),
    "text for a switch": (
        ["trainer.bf16=yes"],
        ["trainer.bf16: 'yes' is not true or false or null; give it a value of this type"],
    ),
    "missing value": (["optimizer.lr=???"], ["optimizer.lr", "is not set"]),
    "missing environment variable": (
        ["model.revision=${oc.env:NO_SUCH_VARIABLE}"],
        ["model.revision", "NO_SUCH_VARIABLE"],
    ),
    "interpolation to nowhere": (["seed=${nowhere.at.all}"], ["seed", "can't be resolved"]),
    "unknown class": (["optimizer._target_=torch.optim.AdamX"], ["optimizer._target_", "did you mean 'Adam"]),
    "unknown package": (
        ["optimizer._target_=tourch.optim.AdamW"],
        ["optimizer._target_", "no installed package 'tourch'"],
    ),
    "no class at all": (["optimizer._target_=adamw"], ["optimizer._target_", "not a dotted path"]),
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
    "LBFGS": (["optimizer._target_=torch.optim.LBFGS"], ["LBFGS", "only one parameter group"]),
    "torch's Adafactor": (["optimizer._target_=torch.optim.Adafactor"], ["Adafactor", "scales each update"]),
    "Adafactor with relative steps": (["optimizer=adafactor", "optimizer.relative_step=true"], ["relative_step"]),
    "second master of the rate": (
        ["trainer.learning_rate=1"],
        ["trainer.learning_rate: can't be set here; it is set by optimizer.lr"],
    ),
    "second master of the rate among a task's arguments": (
        ["task.args.learning_rate=1"],
        ["task.args.learning_rate: can't be set here; it is set by optimizer.lr"],
    ),
    "second master behind a plus": (["+trainer.learning_rate=1"], ["trainer.learning_rate", "optimizer.lr"]),
    "second master of the optimizer": (["trainer.optim=adamw_torch"], ["trainer.optim", "optimizer group"]),
    "second master of the seed": (["trainer.seed=1"], ["trainer.seed", "it is set by seed"]),
    "second master of the folder": (["trainer.output_dir=x"], ["trainer.output_dir", "hydra.run.dir"]),
    "second master of the weight decay": (["trainer.weight_decay=1"], ["can't be set here", "optimizer.weight_decay"]),
    "second master of the warm-up": (
        ["trainer.warmup_steps=5"],
        ["trainer.warmup_steps: can't be set here", "scheduler.num_warmup_steps"],
    ),
    "packing without a length": (
        ["task.args.packing=true", "task.args.max_length=null"],
        ["task.args.max_length: packing fills rows of this length; set a number of tokens"],
    ),
    "a search that can't be resolved": (["tune=${oc.env:NO_SUCH_VARIABLE}"], ["tune: ", "NO_SUCH_VARIABLE"]),
    "halving that can't be resolved": (["halving=${oc.env:NO_SUCH_VARIABLE}"], ["halving: ", "NO_SUCH_VARIABLE"]),
    "argument of this trainer alone": (["+trainer.max_length=5"], ["trainer.max_length", "task.args.max_length"]),
    "argument of every trainer": (["+task.args.max_steps=5"], ["task.args.max_steps", "trainer.max_steps"]),
    "rank 0": (["adapter.r=0"], ["adapter.r", "0 is out of range", "from 1 on"]),
    "dropout 1": (["adapter.lora_dropout=1"], ["adapter.lora_dropout", "below 1"]),
    "ratio 0": (["loraplus.ratio=0"], ["loraplus.ratio", "0 is out of range"]),
    "negative ratio": (["loraplus.ratio=-3"], ["loraplus.ratio", "-3 is out of range"]),
    "ratio NaN": (["loraplus.ratio=nan"], ["loraplus.ratio", "nan is out of range"]),
    "ratio null": (["loraplus.ratio=null"], ["loraplus.ratio", "null is not a number"]),
    "rate inf": (["optimizer.lr=inf"], ["optimizer.lr", "inf is out of range"]),
    "rate 0": (["optimizer.lr=0"], ["optimizer.lr", "0 is out of range"]),
    "negative weight decay": (["optimizer.weight_decay=-0.1"], ["optimizer.weight_decay", "from 0 on"]),
    "no step": (["trainer.max_steps=0"], ["trainer.max_steps", "from 1 on"]),
    "no batch": (
        ["trainer.per_device_train_batch_size=0"],
        ["trainer.per_device_train_batch_size", "from 1 on"],
    ),
    "ratio of a preset without one": (
        ["loraplus=none", "loraplus.ratio=16"],
        ["loraplus.ratio: there is no such key", "an option that has this key: loraplus=default"],
    ),
    "setting that other optimizers have": (
        ["optimizer=sgd", "optimizer.betas=[0.9,0.99]"],
        ["optimizer.betas", "an option that has this key: optimizer=adam", "the group's class, write +optimizer.betas"],
    ),
    "argument that another task has": (
        ["task.args.beta=1"],
        ["task.args.beta", "an option that has this key: task=dpo"],
    ),
    "rule without a plus": (
        ["loraplus.extra_rules.head={pattern: score, lr: 1}"],
        ["loraplus.extra_rules.head", "To add it, write +loraplus.extra_rules.head="],
    ),
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
    "ratio that does nothing": (["loraplus.rules.groupB=null"], ["ratio 8 has no effect", "loraplus=none"]),
    "file not there": (
        ["data.train=nowhere.jsonl"],
        ["data.train: nowhere.jsonl: No such file; it was searched for in /", ": give the path of an existing file"],
    ),
    "file in a folder that isn't there": (["data.train=x/y.jsonl"], ["No such file; there is no folder /", "/x: give"]),
    "tokenizer not there": (["model.tokenizer=./nowhere"], ["model.tokenizer: there is no folder ./nowhere"]),
    "target modules": (["adapter.target_modules=[query]"], ["adapter.target_modules", "query", "q_proj", "all-linear"]),
    "dtype": (["model.dtype=float17"], ["model.dtype", "float17", "bfloat16"]),
    "unreadable value": (["optimizer.lr=[1"], ["optimizer.lr=[1", "can't be read"]),
    "not an override": (["chek"], ["chek", "neither a command nor key=value"]),
    "trainer fields that contradict": (
        ["+trainer.load_best_model_at_end=true", "trainer.eval_strategy=no"],
        ["trainer"],
    ),
    "schedule that changes the ratio": (
        ["scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "+scheduler.max_lr=0.1"],
        ["scheduler", "doesn't keep the ratio", "one_cycle"],
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


# On top of the defaults alone, and all that is said.
ONCE: dict[str, tuple[list[str], str]] = {
    "key that another option has": (
        ["data.train=nowhere.jsonl"],
        "data.train: there is no such key; choose an option that has this key: data=csv, data=jsonl, data=parquet, "
        "data=text",
    ),
    "key that no preset has": (
        ["loraplus.scale=3"],
        "loraplus.scale: there is no such key; loraplus has the keys extra_rules, lr_embedding, lr_head, ratio, rules",
    ),
    "text for a list": (["model.add_tokens=x"], "model.add_tokens: 'x' is not a list; write model.add_tokens=[x]"),
    "value that isn't set": (["data=jsonl"], "data.train: is not set; set it: data.train=..."),
    "folder not there": (
        ["model=hub", "model.path=./nowhere"],
        "model.path: there is no folder ./nowhere (searched for in {folder}); "
        "give a folder that contains a model with its config.json and tokenizer",
    ),
    "folder not there, from the root": (
        ["model=hub", "model.path={folder}/nowhere"],
        "model.path: there is no folder {folder}/nowhere; "
        "give a folder that contains a model with its config.json and tokenizer",
    ),
}


@pytest.mark.parametrize("mistake", ONCE)
def test_one_mistake_is_one_thing_to_put_right(mistake: str, cli: Callable[..., Finished], tmp_path: Path) -> None:
    overrides, told = ONCE[mistake]
    finished = cli("check", *(override.format(folder=tmp_path) for override in overrides))
    assert finished.status == 1
    assert finished.err == f"1 error:\n  - {told.format(folder=tmp_path)}\n"


@pytest.mark.parametrize(
    ("said", "line"),
    [("It fails.\nHere.", "It fails"), ("and so on ...", "and so on ..."), (" \n", "ValueError"), ("", "ValueError")],
)
def test_first_line_of_an_error_is_part_of_a_sentence(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line


def test_every_mistake_is_told_at_once(tiny_run: list[str], cli: Callable[..., Finished]) -> None:
    finished = cli(
        *tiny_run, "adapter.r=0", "loraplus.ratio=-1", "+trainer.seed=3", "optimizer._target_=torch.nn.Linear"
    )
    for key in ("adapter.r", "loraplus.ratio", "trainer.seed", "optimizer._target_"):
        assert f"- {key}: " in finished.err
    assert "4 errors:" in finished.err


def test_every_override_that_does_not_compose_is_told_at_once(cli: Callable[..., Finished]) -> None:
    finished = cli("optimizr=adamw", "seed=x", "loraplus=foo", "+optimizer.lr=3")
    assert finished.status == 1
    for words in ("optimizr", "seed: 'x'", "no option 'foo'", "+optimizer.lr=3"):
        assert words in finished.err
