"""Random overrides: every outcome of `check` is a right config or a listed error, within seconds, and nothing is left.

The overrides come from a seeded generator, so an example is named by its number. `LORAPLUS_FUZZ_FROM` and
`LORAPLUS_FUZZ_COUNT` choose others than the usual ones.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.io.result import FAILED, OK
from loraplus_hydra.io.run_folder import HYDRA, RESULT
from tests.conftest import Finished

FIRST = int(os.environ.get("LORAPLUS_FUZZ_FROM", "0"))
FEW, MANY = 20, int(os.environ.get("LORAPLUS_FUZZ_COUNT", "2000"))
PART = 200  # the many are examined in parts, which the workers of a test run share
SECONDS = 60  # of processor time for one example; the slowest takes about two
UNTOLD = "HYDRA_FULL_ERROR"  # named in the message of an error that nobody expected

# What is put in place of a value, as it is typed.
SCALARS = (
    *("0", "-0", "-0.0", "1", "-1", "2", "7", "0.5", "1.0", "1e400", "-1e400", "1e-400", "nan", "NaN", "inf", "-inf"),
    *("99999999999999999999999999", "1_000", "0x10", "0b1", "1e5", ".5", "5.", "+3", "--3", "1e", "true", "false"),
    *("True", "yes", "on", "null", "None", "~", "???", "''", '""', "' '", "'0'", "'null'", "abc", "a b", "a:b"),
    *("a=b", "a.b.c", "all-linear", "no", "steps", "auto", "float32", "q_proj", "'(unclosed'", "'[a-z'", "'*'"),
    *("'(a+)+$'", "utf-16", "é", "日本語", "'\\u202e'", "'😀'", "/", ".", "..", "../..", "/dev/null", "/dev/zero/x"),
    *("~/x", "C:\\x", "file:///x", "'a\\nb'", "'a\tb'", "#x", "'#x'", "!!python/object/apply:os.system"),
    *("'!!python/name:os.system'", "!x", "&a", "*a", "{", "}", "[", "]", "'", '"', "\\", "$", "$$", "${", "${}"),
    *("${x", "$x", "%s", "{0}", "x" * 5000, "pkg://", "pkg://nowhere/x", "pkg://loraplus_hydra.data.embedded/nothing"),
    *("owner/name", "a/b/c", "torch.optim.AdamW", "os.system", "builtins.exec", "torch.load", "peft.LoraConfig"),
    *("trl.SFTTrainer", "loraplus_hydra", "no.such.thing", "a,b", "1,2", "range(3)", "choice(1,2)", "glob(*)"),
    *("interval(0,1)", "str(3)", "int(x)", "float(nan)", "shuffle(a)"),
)
CONTAINERS = (
    *("[]", "{}", "[[]]", "[{}]", "{a: {}}", "{a: 1}", "{1: 2}", "{true: x}", "{null: x}", "[1, 2]", "[a, b]"),
    *("[null]", "[0.9]", "[0.9, 0.999]", "[nan, nan]", "[true]", "['']", "[[1], [2]]"),
    *("{_target_: os.system, command: 'exit 3'}", "{_target_: peft.LoraConfig}", "{_args_: [1]}"),
    *("{_partial_: true}", "{x: ???}", "[???]", "{x: ${x}}", "[${seed}]", "{role: lora_B}"),
    *("{role: lora_B, ratio: 2}", "{role: [lora_A, lora_B], lr: 1}", "{pattern: '('}", "{role: 3}"),
    *("{pattern: .*, lr: 1e-3}", "{lr: nan}", "{group: [a]}", "{owner: {}}", "{ndim: x}", "{betas: x, role: lora_A}"),
    "[" * 30 + "]" * 30,
)
INTERPOLATIONS = (
    *("${seed}", "${nowhere}", "${..}", "${...seed}", "${.lr}", "${model}", "${model.lr}", "${optimizer}"),
    *("${trainer}", "${oc.env:NO_SUCH_VARIABLE}", "${oc.env:HOME}", "${oc.decode:'{a: 1}'}", "${oc.decode:'['}"),
    *("${oc.create:{a: 1}}", "${oc.select:nowhere}", "${oc.dict.keys:model}", "${no_resolver:1}", "${now:%Y}"),
    *("${hydra:job.name}", "${oc.env:}", "${${seed}}", "${a${b}}", "x${seed}y", "'${seed}'", "\\${seed}", "${seed"),
    *("${oc.deprecated:seed}", "${model.${seed}}"),
)
INVENTED = (
    *("x", "x.y", "seeed", "model.x", "adapter.x", "adapter.r.x", "optimizer.betas.0", "optimizer.betas.x"),
    *("trainer.x.y", "loraplus.x", "loraplus.rules.x", "loraplus.rules.groupA.x", "loraplus.extra_rules.x"),
    *("loraplus.extra_rules.x.lr", "data.x", "data.x_column", "data._target_.x", "task.args.x", "task.args.x.y"),
    *("scheduler.x", "quantization.x", "quantization._target_", "adapter.init_lora_weights.x", "optimizer._args_"),
    *("adapter._partial_", "_target_", "é", "trainer.learning_rate", "trainer.deepspeed", "trainer.fsdp"),
    *("trainer.fsdp_config", "trainer.accelerator_config", "trainer.lr_scheduler_kwargs", "trainer.optim_args"),
    *("trainer.debug", "trainer.neftune_noise_alpha", "model.config.x", "trainer.torch_compile_backend"),
    *("trainer.use_liger_kernel", "trainer.label_names", "trainer.group_by_length", "adapter.rank_pattern"),
    *("adapter.alpha_pattern", "adapter.layers_to_transform", "adapter.layers_pattern", "adapter.modules_to_save"),
    *("adapter.exclude_modules", "adapter.use_dora", "adapter.use_rslora", "adapter.task_type"),
    *("adapter.layer_replication", "adapter.megatron_config", "adapter.loftq_config", "adapter.target_parameters"),
    *("adapter.trainable_token_indices", "adapter.eva_config", "adapter.peft_type", "adapter.inference_mode"),
    *("optimizer.fused", "optimizer.eps", "optimizer.amsgrad", "optimizer.foreach", "scheduler.num_cycles"),
    *("data.quote", "task.args.eos_token", "task.args.chat_template_path", "task.args.packing"),
    *("task.args.loss_type", "data.delimiter"),
)
GROUPS: dict[str, tuple[str, ...]] = {
    "adapter": (
        "lora",
        "rslora",
        "dora",
        "pissa",
        "olora",
        "adalora",
        "vera",
        "lora_embeddings",
        "lora_a_zero",
        "existing",
    ),
    "optimizer": ("adamw", "sgd", "adafactor", "lion", "muon", "adam", "adamw8bit"),
    "scheduler": ("constant", "linear", "cosine", "cosine_with_min_lr", "one_cycle", "polynomial", "wsd"),
    "loraplus": ("default", "peft", "roles", "absolute", "none"),
    "task": ("sft", "text", "classification", "dpo"),
    "quantization": ("none", "int8", "nf4"),
    "trainer": ("default", "cpu", "gpu", "ddp", "fsdp2"),
    "experiment": ("easy", "hard", "conservative", "layerwise", "orpo"),
    "debug": ("fast", "overfit", "one_batch"),
    "model": ("hub", "gpt2", "nowhere"),
    "data": ("jsonl", "csv", "text", "parquet", "glue", "hub"),
    "logger": ("none", "tensorboard", "wandb", "mlflow"),
}


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of a plain config: its groups, its lists and its values."""
    for key, value in node.items():
        inside = f"{path}.{key}" if path else str(key)
        yield inside
        if isinstance(value, dict):
            yield from leaves(value, inside)


def overrides_of(number: int, keys: list[str]) -> list[str]:
    """The overrides of an example: one to three, each of another kind."""
    dice = random.Random(number)
    return [_override(dice, keys) for _ in range(dice.choice((1, 1, 2, 3)))]


def _override(dice: random.Random, keys: list[str]) -> str:
    kind = dice.random()
    key = dice.choice(keys) if dice.random() < 0.75 else dice.choice(INVENTED)
    if kind < 0.08:
        group = dice.choice(list(GROUPS))
        return (
            f"{group}={dice.choice((*GROUPS[group], *SCALARS)) if dice.random() < 0.2 else dice.choice(GROUPS[group])}"
        )
    if kind < 0.13:
        return f"~{key}" + (f"={_value(dice)}" if dice.random() < 0.2 else "")
    if kind < 0.16:
        return "".join(dice.choice("ab.=+~@:/${}[]'\"\\ \t,é0-") for _ in range(dice.randint(1, 12)))
    if kind < 0.18:
        return f"{dice.choice(('+', '++', ''))}{key}@{dice.choice(('x', 'model', '_global_', ''))}={_value(dice)}"
    known = key in keys
    sign = dice.choice(("", "", "", "++", "+")) if known else dice.choice(("+", "+", "++", ""))
    return f"{sign}{key}={_value(dice)}"


def _value(dice: random.Random) -> str:
    return dice.choice(dice.choice((SCALARS, SCALARS, CONTAINERS, INTERPOLATIONS)))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in this thread when the block takes longer."""

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def unexpected(finished: Finished) -> str:
    """What no outcome may have: another exit status, or a traceback."""
    if finished.status not in (0, 1):
        return f"exit status {finished.status}"
    told = finished.out + finished.err
    return f"an error that nobody expected: {finished.err[-800:]}" if "Traceback" in told or UNTOLD in told else ""


def wrong_with(finished: Finished, folder: Path) -> str:
    """What an outcome has that it may not have; empty for a right config or a listed error."""
    if wrong := unexpected(finished):
        return wrong
    if finished.status == 1 and not re.search(r"^(\d+ errors?:|Error: )", finished.err, re.MULTILINE):
        return f"an error that isn't told: {finished.err[-800:]}"
    if left := sorted(path.name for path in folder.iterdir()):
        return f"left behind: {left}"
    return ""


@pytest.fixture(scope="session")
def known_keys() -> list[str]:
    return composed_keys()


def composed_keys() -> list[str]:
    """The keys of some composed configs."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register

    register()
    GlobalHydra.instance().clear()
    found: dict[str, None] = {}
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        for options in (["data=csv"], ["task=classification", "adapter=adalora"], ["task=dpo", "quantization=nf4"]):
            plain = OmegaConf.to_container(compose("config", overrides=options))
            assert isinstance(plain, dict)
            found |= dict.fromkeys(leaves(plain))
    return list(found)


def examine(
    numbers: range, keys: list[str], run: list[str], cli: Callable[..., Finished], folder: Path
) -> dict[int, tuple[list[str], str]]:
    """The examples whose outcome is wrong, with why."""
    wrong = {}
    for number in numbers:
        overrides = overrides_of(number, keys)
        started, used = time.perf_counter(), time.process_time()
        try:
            with within(10 * SECONDS):  # on a loaded machine a command waits
                reason = wrong_with(cli("check", *run, *overrides), folder)
            if not reason and (took := time.process_time() - used) > SECONDS:
                reason = f"it took {took:.0f} s of processor time"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            reason = f"{type(error).__name__} out of the command line: {error}"
        if os.environ.get("LORAPLUS_FUZZ_LOG"):
            with Path(os.environ["LORAPLUS_FUZZ_LOG"]).open("a") as log:
                seconds = time.perf_counter() - started
                log.write(f"{number}\t{seconds:.1f}\t{[text[:200] for text in overrides]}\t{reason!r}\n")
        if reason:
            wrong[number] = ([text[:200] for text in overrides], reason)
    return wrong


def test_any_overrides_are_a_right_config_or_a_listed_error(
    known_keys: list[str], tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    wrong = examine(range(FIRST, FIRST + FEW), known_keys, tiny_run, cli, tmp_path)
    assert not wrong, "\n".join(f"{number}: {what}" for number, what in wrong.items())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST + FEW, FIRST + FEW + MANY, PART))
def test_thousands_of_overrides_are_a_right_config_or_a_listed_error(
    first: int, known_keys: list[str], tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    wrong = examine(range(first, first + PART), known_keys, tiny_run, cli, tmp_path)
    assert not wrong, "\n".join(f"{number}: {what}" for number, what in wrong.items())


def wrong_with_run(finished: Finished, folder: Path) -> str:
    """What the outcome of a run has that it may not have: it ends well, or as a listed error that is recorded."""
    if wrong := unexpected(finished):
        return wrong
    runs = [path for path in folder.rglob(RESULT) if HYDRA not in path.parts]
    statuses = [json.loads(path.read_text(encoding="utf-8"))["status"] for path in runs]
    if statuses != ([OK] if finished.status == 0 else [FAILED] * len(statuses)):
        return f"exit status {finished.status}, but {RESULT} says {statuses}"
    if unfinished := sorted(path.name for path in folder.rglob("*.unfinished")):
        return f"half written: {unfinished}"
    return ""


# Values that may well be right, and right together or not.
LIKELY: dict[str, tuple[str, ...]] = {
    **{group: GROUPS[group] for group in ("adapter", "optimizer", "scheduler", "loraplus", "trainer", "experiment")},
    "task": ("sft", "text"),
    "seed": ("0", "1", "4294967296", "99999999999999999999"),
    "model.dtype": ("float32", "bfloat16", "float16", "auto"),
    "model.add_tokens": ("[]", "[x]", "['<new>', '']"),
    "adapter.r": ("1", "3", "64", "1000"),
    "adapter.lora_alpha": ("1e-30", "7", "1e30"),
    "adapter.lora_dropout": ("0.5", "0.999999"),
    "adapter.bias": ("none", "all", "lora_only", "x"),
    "adapter.target_modules": ("[q_proj]", "all-linear", "'.*proj'", "[embed_tokens]", "null", "[lm_head]"),
    "optimizer.lr": ("1e-45", "1e-3", "1e30"),
    "optimizer.weight_decay": ("0", "1", "1e30"),
    "loraplus.ratio": ("1", "1e-20", "1e20"),
    "scheduler.warmup_ratio": ("0", "0.5", "1"),
    "data.eval_fraction": ("1e-9", "0.5", "0.999999"),
    "data.max_samples": ("1", "2", "1000"),
    "data.streaming": ("true", "false"),
    "trainer.per_device_train_batch_size": ("1", "100000"),
    "trainer.gradient_accumulation_steps": ("2", "1000"),
    "trainer.max_grad_norm": ("0", "1e-30", "1e30"),
    "trainer.eval_steps": ("1", "0.5", "null"),
    "trainer.save_steps": ("1", "0.3"),
    "trainer.logging_steps": ("1", "0.9", "1000"),
    "trainer.activation_checkpointing": ("true", "false"),
    "trainer.early_stopping_patience": ("1", "null"),
    "trainer.ema": ("0.5", "null"),
    "+trainer.load_best_model_at_end": ("true",),
    "+trainer.label_smoothing_factor": ("0.1", "2"),
    "+trainer.neftune_noise_alpha": ("5", "1e30"),
    "+trainer.dataloader_drop_last": ("true",),
    "task.args.max_length": ("1", "8", "null"),
    "task.args.packing": ("true",),
}


def likely_overrides(number: int) -> list[str]:
    """Two to four overrides that may well be right."""
    dice = random.Random(number)
    return [f"{key}={dice.choice(LIKELY[key])}" for key in dice.sample(list(LIKELY), dice.randint(2, 4))]


@pytest.mark.slow
def test_what_passes_the_check_ends_as_a_run_or_a_listed_error(
    tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    short = ("trainer.max_steps=1", "task.samples=1", "task.sample_tokens=2", "hydra.run.dir=run")
    wrong: dict[int, tuple[list[str], str]] = {}
    ran = 0
    for number in range(FIRST, FIRST + min(MANY, 150)):
        overrides = likely_overrides(number)
        with within(10 * SECONDS):
            ended = cli(*tiny_run, *overrides, *short)
        if reason := wrong_with_run(ended, tmp_path):
            wrong[number] = (overrides, reason)
        ran += ended.status == 0
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert not wrong, "\n".join(f"{number}: {what}" for number, what in wrong.items())
    assert ran > 0


# What the generator has found, told by name.
FOUND: dict[str, tuple[list[str], str]] = {
    "interval where one value is needed": (["seed=interval(0,1)"], "seed=interval(0,1): is an interval or a pattern"),
    "pattern of options": (["optimizer=glob(*)"], "optimizer=glob(*): is an interval or a pattern"),
    "values of a sweep beside another mistake": (["++task.args.x.y=1,2", "+x=1"], "has several values"),
    "number for a group's option": (["optimizer=1e5"], "optimizer"),
    "number for a group's option, added": (["+optimizer=1_000"], "optimizer"),
    "package that isn't there": (
        ["model.path='pkg://nowhere/x'"],
        "model.path: 'pkg://nowhere/x' is not a folder of an installed Python package",
    ),
    "package without a name": (
        ["model.path='pkg://'"],
        "model.path: 'pkg://' is not a folder of an installed Python package",
    ),
    "module that is no package": (
        ["model.tokenizer='pkg://os/x'"],
        "model.tokenizer: 'pkg://os/x' is not a folder of an installed Python package",
    ),
    "model without a name": (["model.path=''"], "model.path: '' is not a name"),
    "model with too long a name": ([f"model.path={'x' * 5000}"], "File name too long"),
    "rows with too long a name": ([f"data.train={'x' * 5000}"], "data.train"),
    "rows without a name": (["data.train=''"], "data.train: '' is not a path"),
    "number for a group of keys": (["task.args=${seed}"], "task.args: '0' is not a mapping of keys"),
    "text for a group of keys": (["++task.args=\\${seed}"], "task.args"),
    "settings of an optimizer that contradict": (["+optimizer.foreach=true"], "optimizer: `fused` and `foreach`"),
    "seed beyond numpy's": (["seed=4294967296"], "seed: 4294967296 is out of range"),
    "token without a text": (["model.add_tokens=['<new>', '']"], "model.add_tokens: a token must not be empty"),
    "rows left out of the evaluation": (["+trainer.dataloader_drop_last=true"], "omits rows from the evaluation"),
    "flag that there isn't": (["-+é-{}"], "-+é-{}: there is no such flag"),
    "file of settings that isn't there": (
        ["++trainer.accelerator_config=%s"],
        "trainer.accelerator_config: it can't be read",
    ),
    "text for a mapping of arguments": (
        ["++trainer.activation_checkpointing_kwargs=%s"],
        "trainer.activation_checkpointing_kwargs: text is not a mapping",
    ),
    "key inside a failed interpolation": (
        ["loraplus.rules=${oc.env:}", "loraplus.rules.groupA.role=${seed}"],
        "is not a mapping of keys",
    ),
    "new key inside a value": (
        ["model.config={hidden_size: 4}"],
        "model.config: the value has a key that is not there yet; add it with a plus: +model.config={hidden_size: 4}",
    ),
    "key inside a number": (["optimizer.lr.x=2"], "optimizer.lr.x: optimizer.lr is not a mapping of keys"),
    "broken pattern of layers": (["adapter.target_modules='('"], "adapter"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_the_generator_has_found_is_told(
    name: str, tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    overrides, told = FOUND[name]
    ended = cli("check", *tiny_run, *overrides)
    assert ended.status == 1
    assert told in ended.err
    assert wrong_with(ended, tmp_path) == ""
