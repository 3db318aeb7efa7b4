"""Configs that nobody trusts, typed or stored: what they name is refused before it is imported or called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.support.finished_runs import finished
from tests.support.hostile import COMMANDS, canary, files_of, model_of, refused, run, spoil

__all__ = ["canary", "finished", "run"]

# Configs: what they name


EXECUTES = (
    *("os.system", "builtins.exec", "builtins.eval", "builtins.open", "subprocess.run", "shutil.rmtree", "torch.load"),
    *("pathlib.Path.write_text", "importlib.import_module", "torch.os.system", "torch.hub.load", "pickle.loads"),
    *("pandas.read_pickle", "numpy.load", "joblib.load", "sympy.sympify", "setuptools._distutils.spawn.spawn"),
    *(
        "hydra.utils.instantiate",
        "hydra.utils.get_method",
        "loraplus_hydra.config.targets.locate",
        "datasets.load_from_disk.__class__",
    ),
    *(
        "peft.import_utils.importlib.import_module",
        "transformers.AutoModelForCausalLM.from_pretrained",
        "runpy.run_path",
    ),
)
PLACES = ("quantization", "adapter", "optimizer", "scheduler", "task", "data", "logger")


@pytest.mark.parametrize("target", EXECUTES)
def test_target_that_executes_is_refused_at_every_place(
    target: str, tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    places = [f"++{place}._target_={target}" for place in PLACES]
    classes = [f"task.{name}={target}" for name in ("args_class", "auto_class", "examples")]
    ended = cli(*tiny_run, *places, *classes)
    refused(ended, *(f"- {place}._target_: '{target}'" for place in PLACES))
    refused(ended, *(f"- task.{name}: '{target}'" for name in ("args_class", "auto_class", "examples")))
    assert list(tmp_path.iterdir()) == []


# Keys of open groups, which take any value when the config is composed, and keys whose type refuses a mapping there.
OPEN = (
    *(
        "+model.config.x",
        "+quantization.x",
        "+adapter.x",
        "adapter.lora_alpha",
        "+adapter.loftq_config",
        "+optimizer.x",
    ),
    *(
        "optimizer.weight_decay",
        "+scheduler.x",
        "scheduler.warmup_ratio",
        "+loraplus.rules.x",
        "+loraplus.extra_rules.x.group",
    ),
    *("+data.x", "data.max_samples", "+task.args.x", "task.args.max_length", "+trainer.x", "trainer.max_steps"),
)
TYPED = ("+model.x", "model.add_tokens", "optimizer.betas", "model.dtype", "task.chat", "seed", "+x")
SPELT = {
    "plainly": "{{_target_: {target}, command: '{command}'}}",
    "in a list": "[{{_target_: {target}, command: '{command}'}}]",
    "deeper": "{{a: [{{b: {{_target_: {target}, command: '{command}'}}}}]}}",
    "by position": "{{_target_: {target}, _args_: ['{command}']}}",
    "partially": "{{_target_: {target}, _partial_: true, command: '{command}'}}",
    "decoded": "'${{oc.decode:\"{{_target_: {target}, command: {command}}}\"}}'",
    "created": "'${{oc.create:{{_target_: {target}, command: {command}}}}}'",
}


@pytest.mark.parametrize("spelling", SPELT)
@pytest.mark.parametrize("target", ["os.system", "peft.tuners.tuners_utils.os.system"])
def test_nested_target_is_refused_wherever_it_stands(
    target: str, spelling: str, tiny_run: list[str], canary: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    value = SPELT[spelling].format(target=target, command=f"touch {canary}")
    ended = cli(*tiny_run, *(f"{key}={value}" for key in OPEN))
    refused(ended, *(f"- {key.lstrip('+')}" for key in OPEN))
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", TYPED)
def test_nested_target_is_refused_where_no_mapping_may_stand(
    key: str, tiny_run: list[str], canary: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    refused(cli(*tiny_run, f"{key}={{_target_: os.system, command: 'touch {canary}'}}"), f"- {key.lstrip('+')}")
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["_args_=[1]", "_partial_=true", "_recursive_=false", "_convert_=none"])
def test_hydras_other_instantiation_keys_are_refused(
    word: str, tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    places = [place for place in PLACES if place != "task"]
    ended = cli(*tiny_run, *(f"+{place}.{word}" for place in places))
    refused(ended, *(f"{place}.{word.partition('=')[0]}: " for place in places))
    assert list(tmp_path.iterdir()) == []


def test_module_of_pythons_own_is_not_even_imported(
    tiny_run: list[str], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    import webbrowser

    monkeypatch.setattr(webbrowser, "open", lambda *_: pytest.fail("antigravity was imported"))
    refused(cli(*tiny_run, "data._target_=antigravity.fly"), "part of Python itself")
    assert "antigravity" not in sys.modules


def test_nested_settings_of_peft_are_taken(tiny_run: list[str], cli: Callable[..., Finished]) -> None:
    settings = "+adapter.runtime_config={_target_: peft.tuners.lora.config.LoraRuntimeConfig}"
    assert cli("check", *tiny_run, settings).status == 0


# Configs: a finished run of somebody else's


STORED = {
    "adapter._target_": ("_target_: peft.LoraConfig", "_target_: TARGET\n  command: touch CANARY"),
    "adapter.lora_alpha._target_": ("lora_alpha: 16", "lora_alpha: {_target_: TARGET, command: touch CANARY}"),
    "task._target_": ("_target_: trl.SFTTrainer", "_target_: TARGET"),
    "task.args_class": ("args_class: trl.SFTConfig", "args_class: TARGET"),
    "task.auto_class": ("auto_class: transformers.AutoModelForCausalLM", "auto_class: TARGET"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("key", STORED)
@pytest.mark.parametrize("target", ["os.system", "peft.tuners.tuners_utils.os.system"])
def test_target_in_a_stored_config_is_refused(
    target: str, key: str, command: list[str], run: Path, canary: Path, cli: Callable[..., Finished]
) -> None:
    spoil(run, *STORED[key], TARGET=target, CANARY=str(canary))
    before = files_of(run)
    refused(cli(command[0], str(run), *command[1:]), key, target)
    assert not canary.exists()
    assert files_of(run) == before


@pytest.mark.parametrize("command", [["evaluate"], ["resume"]])
@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("_target_: loraplus_hydra.data.files.load", "_target_: pandas.read_pickle", "data._target_"),
        ("examples: loraplus_hydra.tasks.sft.examples", "examples: os.system", "task.examples"),
        ("_target_: torch.optim.AdamW", "_target_: torch.os.system", "optimizer._target_"),
        (
            "_target_: transformers.optimization.get_linear_schedule_with_warmup",
            "_target_: setuptools._distutils.spawn.spawn",
            "scheduler._target_",
        ),
    ],
)
def test_target_in_what_a_stored_config_says_of_training_is_refused(
    command: list[str], old: str, new: str, key: str, run: Path, cli: Callable[..., Finished]
) -> None:
    spoil(run, old, new)
    before = files_of(run)
    refused(cli(command[0], str(run)), key)
    assert files_of(run) == before


@pytest.mark.parametrize("command", [*COMMANDS, ["resume"]])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_target_: trl.SFTTrainer", "_target_: HERE.payload.Trainer"),
        ("_target_: peft.LoraConfig", "_target_: HERE.adapter.payload.Config"),
        ("path: MODEL", "path: pkg://HERE.payload/x"),
    ],
)
def test_code_in_the_runs_own_folder_is_not_imported(
    command: list[str],
    old: str,
    new: str,
    run: Path,
    canary: Path,
    cli: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder in (run, run / "adapter"):
        (folder / "payload.py").write_text(f"import os\nos.system('touch {canary}')\n")
    monkeypatch.syspath_prepend(str(run.parent))
    spoil(run, old.replace("MODEL", model_of(run)), new.replace("HERE", run.name))
    refused(cli(command[0], str(run), *command[1:]), "is code in the run's own folder")
    assert not canary.exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("!!python/object/apply:os.system ['touch CANARY']", "config.yaml can't be read"),
        ("model: !!python/object/apply:os.system ['touch CANARY']", "config.yaml can't be read"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "YAML aliases"),
        ("seed: ${oc.env:HOME}\n", "seed is an interpolation"),
        ("a: " + "[" * 1500, "config.yaml can't be read"),
        ("\x00", "config.yaml can't be read"),
        ("[1, 2]", "holds a list"),
        ("", "it is empty"),
    ],
)
def test_stored_config_that_is_no_config_is_refused(
    text: str, told: str, command: list[str], run: Path, canary: Path, cli: Callable[..., Finished]
) -> None:
    (run / "config.yaml").write_text(text.replace("CANARY", str(canary)))
    refused(cli(command[0], str(run), *command[1:]), told)
    assert not canary.exists()
