"""Nothing lost: a run that is killed or stopped goes on to the numbers of one that never was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.errors import UserError
from tests.conftest import Finished
from tests.runs.conftest import AUTO
from tests.support import processes
from tests.support.forking import differences, lines, write_trials

# Saves that are no multiple of the logged steps; dropout and accumulation, so that every random state counts.
LONGER = (
    *("trainer.max_steps=30", "trainer.logging_steps=7", "trainer.save_steps=5", "trainer.eval_steps=10"),
    *("trainer.gradient_accumulation_steps=2", "adapter.lora_dropout=0.1", "trainer.save_total_limit=2"),
)
FEWER = ("trainer.max_steps=15", "trainer.save_steps=3", "trainer.eval_steps=5")
SHORT = ("trainer.max_steps=8", "trainer.logging_steps=3", "trainer.save_steps=2")


def trials(folder: Path, how: str, *overrides: str, draws: bool = False) -> list[dict[str, Any]]:
    """Return what `write_trials` prints, in a process whose children start fast."""
    ended = processes.run(write_trials, folder, how, draws, list(overrides), folder=folder)
    assert ended.status == 0, ended.out[-3000:]
    return [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]


def check_killed(seen: list[dict[str, Any]], kills: int) -> None:
    for trial in seen:
        assert trial["status"] == 0, trial
        assert trial["broken"] == [], trial
        assert trial["differences"] == [], trial
    assert sum(trial["killed"] for trial in seen) == kills
    assert sum(trial["in_save"] for trial in seen) >= kills / 3
    assert sum(trial.get("killed_again", False) for trial in seen) >= kills // 10


def test_killed_runs_go_on_to_the_bits_of_the_unbroken_one(tiny_run: list[str], tmp_path: Path) -> None:
    check_killed(trials(tmp_path, "3", *tiny_run, *LONGER, *FEWER), 3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_twenty_killed_runs_go_on_to_the_bits_of_the_unbroken_one(
    optimizer: str, tiny_run: list[str], tmp_path: Path
) -> None:
    # From 4,096 numbers a tensor on bitsandbytes keeps 8-bit state.
    check_killed(trials(tmp_path, "20", *tiny_run, *LONGER, f"optimizer={optimizer}", "adapter.r=128", draws=True), 20)


def test_signals_end_a_run_with_a_checkpoint_of_its_last_step(tiny_run: list[str], tmp_path: Path) -> None:
    seen = trials(tmp_path, "signals", *tiny_run, *LONGER, "trainer.max_steps=40", "trainer.logging_steps=2")
    assert [trial["stopped_with"] for trial in seen] == [130, 143]
    for trial in seen:
        assert trial["said"] == "interrupted"
        assert 0 < trial["steps"] == trial["newest"] < 40
        assert (trial["status"], trial["differences"]) == (0, []), trial


STREAMED = ("data.streaming=true", "data.eval=${data.train}")
VARIANTS = {
    "dropout": ("adapter.lora_dropout=0.1",),
    "8-bit optimizer": ("optimizer=adamw8bit", "adapter.r=128", "adapter.lora_dropout=0.1"),
    "paged 32-bit optimizer, new tokens": ("optimizer=paged_adamw32bit", "model.add_tokens=[new_a,new_b]"),
    "Lion, saved modules": ("optimizer=lion", "+adapter.modules_to_save=[lm_head]"),
    "muon, no clipping": ("optimizer=muon", "trainer.max_grad_norm=0"),
    "PiSSA, one cycle": ("adapter=pissa", "scheduler=one_cycle"),
    "OLoRA, cosine": ("adapter=olora", "scheduler=cosine", "scheduler.warmup_ratio=0.3"),
    "EVA": ("adapter=eva", "adapter.r=2", "adapter.lora_dropout=0.1"),
    "LoftQ": ("quantization=nf4", "adapter=loftq"),
    "DoRA": ("adapter=dora", "adapter.lora_dropout=0.1"),
    "A = 0": ("adapter=lora_a_zero",),
    "AdaLoRA": ("adapter=adalora", "adapter.tinit=1", "adapter.tfinal=1"),
    "VeRA": ("adapter=vera", "loraplus=roles", "adapter.vera_dropout=0.1"),
    "LoRA on embeddings": ("adapter=lora_embeddings",),
    "epochs": ("trainer.max_steps=-1", "trainer.num_train_epochs=2", "trainer.eval_strategy=epoch"),
    "streamed rows, end of an epoch": (*STREAMED, "data.max_samples=20"),
    "streamed rows, second epoch, accumulation": (
        *(*STREAMED, "data.max_samples=12"),
        *("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2"),
    ),
    "nf4": ("quantization=nf4",),
    "LoRA-FA, saved modules": ("optimizer=lora_fa", "+adapter.modules_to_save=[lm_head]"),
    "Riemannian": ("optimizer=riemannian_adamw", "adapter.lora_dropout=0.1"),
    "schedule-free": (
        *("optimizer=schedulefree_adamw", "optimizer.warmup_steps=3", "scheduler=constant"),
        *("trainer.eval_steps=3", "adapter.lora_dropout=0.1"),
    ),
}
NEEDS = {"schedule-free": pytest.mark.extras}
IN_EACH_RUN = (
    *("8-bit optimizer", "paged 32-bit optimizer, new tokens", "PiSSA, one cycle", "AdaLoRA"),
    *("streamed rows, second epoch, accumulation", "nf4", "LoRA-FA, saved modules"),
)


def _marks(name: str) -> Any:
    return NEEDS.get(name, () if name in IN_EACH_RUN else pytest.mark.slow)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=_marks(name)) for name in VARIANTS])
def test_stopped_run_goes_on_to_the_bits_of_the_unbroken_one(
    variant: str, stopped: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    if variant in NEEDS:
        pytest.importorskip("schedulefree")
    overrides = [*tiny_run, *SHORT, *VARIANTS[variant]]
    run(compose(*overrides), tmp_path / "unbroken")
    stopped(tmp_path / "broken", *overrides, at=5)
    assert json.loads((tmp_path / "broken" / "result.json").read_text())["status"] == "interrupted"
    result = run(compose(*overrides, AUTO), tmp_path / "broken")
    assert result.resumed_at == [5]
    assert differences(tmp_path / "broken", tmp_path / "unbroken") == []
    assert [line["step"] for line in lines(tmp_path / "broken")] == sorted(
        line["step"] for line in lines(tmp_path / "unbroken")
    )


def test_resume_takes_the_new_configs_rates_and_says_so(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *SHORT, "trainer.logging_steps=1", "loraplus.ratio=16", "scheduler=constant"]
    assert cli(*overrides, "hydra.run.dir=run", "trainer.max_steps=4").status == 0
    changes = ["loraplus.ratio=4", "optimizer.weight_decay=0.1", "trainer.max_steps=8"]
    finished = cli("resume", "run", *changes)
    assert finished.status == 0, finished.err
    for told in ("loraplus.ratio: 16", "groupB: lr 0.016 -> 0.004", "groupA: weight_decay 0.0 -> 0.1", "steps: 4 -> 8"):
        assert told in finished.out, told
    rates = {line["step"]: line["lr"] for line in lines(tmp_path / "run") if "lr" in line}
    assert rates[4] == {"groupA": 1e-3, "groupB": 16e-3}
    assert [rates[step] for step in (5, 6, 7, 8)] == [{"groupA": 1e-3, "groupB": 4e-3}] * 4
    assert {row["lr"] for row in json.loads((tmp_path / "run" / "param_groups.json").read_text())} == {1e-3, 4e-3}


def test_what_a_resume_changed_holds_for_the_next_one(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *SHORT, "trainer.logging_steps=1", "loraplus.ratio=16", "scheduler=constant"]
    assert cli(*overrides, "hydra.run.dir=run", "trainer.max_steps=4").status == 0
    assert cli("resume", "run", "loraplus.ratio=4", "trainer.max_steps=6").status == 0
    again = cli("resume", "run")
    assert (again.status, "has finished: 6 steps" in again.out) == (0, True), again.err
    further = cli("resume", "run", "trainer.max_steps=8")
    assert further.status == 0, further.err
    assert "trainer.max_steps: 6 -> 8" in further.out
    assert "loraplus.ratio" not in further.out.partition("2/6")[0].partition("Changed")[2]
    rates = {line["step"]: line["lr"]["groupB"] for line in lines(tmp_path / "run") if "lr" in line}
    assert [rates[step] for step in (4, 5, 8)] == [16e-3, 4e-3, 4e-3]
    back = cli("resume", "run", "loraplus.ratio=16", "trainer.max_steps=10")
    assert "loraplus.ratio: 4 -> 16" in back.out, back.err


def test_more_steps_follow_the_longer_schedule(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    assert cli(*tiny_run, "trainer.max_steps=4", "trainer.save_steps=4", "hydra.run.dir=run").status == 0
    assert cli("resume", "run", "trainer.max_steps=10").status == 0
    rates = {line["step"]: line["lr"]["groupA"] for line in lines(tmp_path / "run") if "lr" in line}
    # transformers' linear schedule of ten steps, at the rate that the step begins with
    assert [rates[step] for step in range(5, 11)] == pytest.approx([1e-3 * (10 - done) / 10 for done in range(4, 10)])


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["loraplus=none"], "chooses another option"),
        (["adapter.target_modules=[q_proj]"], "group groupA has other tensors"),
        (["optimizer._target_=torch.optim.SGD", "optimizer.fused=null"], "optimizer"),
        (["trainer.max_steps=3"], "beyond trainer.max_steps=3"),
        (["seed=3"], "seed"),
        (["optimizer=sgd"], "chooses another option"),
        (["optimizer.lr=-1"], "out of range"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_and_nothing_touched(
    changes: list[str], told: str, cli: Callable[..., Finished], trained: Path
) -> None:
    before = files(trained)
    finished = cli("resume", "run", *changes)
    assert finished.status == 1
    assert told in finished.err, finished.err
    assert files(trained) == before


def test_own_command_with_other_groups_is_refused_and_nothing_touched(
    cli: Callable[..., Finished], tiny_run: list[str], trained: Path
) -> None:
    command = [*tiny_run, "trainer.save_steps=2", "hydra.run.dir=run"]
    before = files(trained)
    finished = cli(*command, "trainer.max_steps=8", "adapter.target_modules=[q_proj]", AUTO)
    assert finished.status == 1
    assert "group groupA has other tensors" in finished.err
    assert files(trained) == before  # also what Hydra stored of the command, which `resume` reads


def test_lora_cannot_become_loraplus_on_the_way(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    run(compose(*tiny_run, "trainer.save_steps=2", "loraplus=none"), tmp_path / "run")
    with pytest.raises(UserError, match=r"no longer exists.*group groupA .* is new"):
        run(compose(*tiny_run, "trainer.max_steps=8", AUTO), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "ok"


def test_finished_run_is_left_as_it_is(cli: Callable[..., Finished], tiny_run: list[str], trained: Path) -> None:
    before = files(trained)
    for again in (["resume", "run"], [*tiny_run, "trainer.save_steps=2", "hydra.run.dir=run", AUTO]):
        finished = cli(*again)
        assert finished.status == 0, finished.err
        assert "has finished: 4 steps" in finished.out
    assert files(trained) == before


def test_killed_after_its_last_step_a_run_only_has_to_be_finished(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    import shutil

    overrides = [*tiny_run, "trainer.save_steps=2"]
    run(compose(*overrides), tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "result.json").unlink()
    run(compose(*overrides, AUTO), tmp_path / "run")
    assert differences(tmp_path / "run", tmp_path / "unbroken") == []


def test_a_run_goes_on_from_a_named_checkpoint_of_another(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, "trainer.save_steps=2", "trainer.max_steps=6", "trainer.save_total_limit=null"]
    run(compose(*overrides), tmp_path / "first")
    named = f"trainer.resume_from_checkpoint={tmp_path / 'first' / 'checkpoints' / 'checkpoint-2'}"
    run(compose(*overrides, named), tmp_path / "second")
    assert differences(tmp_path / "second", tmp_path / "first") == []


@pytest.mark.parametrize("around", [None, "lora:\n  seed: 3\n"], ids=["Python", "a program around it"])
def test_run_of_the_library_is_resumed_on_the_command_line(
    around: str | None,
    stopped: Callable[..., None],
    compose: Callable[..., Any],
    cli: Callable[..., Finished],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, *SHORT]
    run(compose(*overrides), tmp_path / "unbroken")
    stopped(tmp_path / "run", *overrides, at=5)
    if around is not None:  # what Hydra keeps of the program's own config
        (tmp_path / "run" / ".hydra").mkdir()
        (tmp_path / "run" / ".hydra" / "config.yaml").write_text(around)
    refused = cli("resume", "run", "loraplus.ratio=2")
    assert (refused.status, "the rules have numbers" in refused.err) == (1, True), refused.err
    finished = cli("resume", "run")
    assert finished.status == 0, finished.err
    assert differences(tmp_path / "run", tmp_path / "unbroken") == []


@pytest.mark.parametrize("name", ["a b", "a,b", "it's", "é", "x[1]"])
def test_run_is_resumed_whatever_its_folder_is_called(
    name: str, cli: Callable[..., Finished], trained: Path, tmp_path: Path
) -> None:
    trained.rename(tmp_path / name)
    finished = cli("resume", name, "trainer.max_steps=5")
    assert finished.status == 0, finished.err
    assert json.loads((tmp_path / name / "result.json").read_text())["steps"] == 5


def test_folder_that_hydra_would_read_as_an_interpolation_is_refused(cli: Callable[..., Finished]) -> None:
    Path("${x}").mkdir()
    finished = cli("resume", "${x}")
    assert (finished.status, "rename the folder" in finished.err) == (1, True), finished.err


def test_used_folder_is_gone_on_in_only_when_asked(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    assert cli(*tiny_run, "hydra.run.dir=run").status == 0
    finished = cli(*tiny_run, "hydra.run.dir=run")
    assert (finished.status, "isn't empty" in finished.err) == (1, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    finished = cli(*tiny_run, "hydra.run.dir=mine", AUTO)
    assert (finished.status, "isn't empty" in finished.err) == (1, True)


@pytest.mark.parametrize(
    ("named", "told"),
    [("missing", "there is no folder missing"), (".", "is not a run's folder"), (None, "no run's folder is given")],
)
def test_resume_says_what_is_no_run(named: str | None, told: str, cli: Callable[..., Finished]) -> None:
    finished = cli("resume", *([named] if named else []))
    assert finished.status == 1
    assert told in finished.err


def test_run_that_was_ended_before_it_began_is_told(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("")  # killed while Hydra wrote it
    finished = cli("resume", "run")
    assert finished.status == 1
    assert "trainer.resume_from_checkpoint=auto" in finished.err
    assert cli(*tiny_run, "hydra.run.dir=run", AUTO).status == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "ok"


def test_two_runs_never_share_a_folder(compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path) -> None:
    from loraplus_hydra.io.locks import folder_lock

    (tmp_path / "run").mkdir()
    with folder_lock(tmp_path / "run"), pytest.raises(UserError, match="a run is active"):
        run(compose(*tiny_run), tmp_path / "run")


def test_evaluation_that_is_no_longer_better_ends_training(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    # At a rate of nothing no evaluation is better than the first.
    still = [*tiny_run, "optimizer.lr=1e-30", "trainer.max_steps=20", "trainer.eval_steps=2", "trainer.save_steps=2"]
    result = run(compose(*still, "trainer.early_stopping_patience=3"), tmp_path / "run")
    assert result.steps == 8
    assert result.status == "ok"


def test_patience_is_gone_on_with(
    stopped: Callable[..., None], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    still = [*tiny_run, "optimizer.lr=1e-30", "trainer.max_steps=20", "trainer.eval_steps=2", "trainer.save_steps=2"]
    still.append("trainer.early_stopping_patience=3")
    stopped(tmp_path / "run", *still, at=6)
    assert run(compose(*still, AUTO), tmp_path / "run").steps == 8


def test_best_checkpoint_is_what_is_saved_and_measured(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    # Called better when it is greater, a loss that falls was best at the first step.
    falling = [*tiny_run, "trainer.max_steps=8", "trainer.eval_steps=1", "trainer.save_steps=1"]
    falling += ["trainer.save_total_limit=1", "+trainer.load_best_model_at_end=true", "task.greater_is_better=true"]
    result = run(compose(*falling), tmp_path / "run")
    losses = {line["step"]: line["eval_loss"] for line in lines(tmp_path / "run") if "eval_loss" in line}
    assert losses[8] < losses[1] == result.metrics["eval_loss"]
    weights = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert weights == (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors").read_bytes()


def test_early_stopping_needs_evaluations(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    finished = cli(*tiny_run, "trainer.early_stopping_patience=2", "trainer.eval_strategy=no")
    assert (finished.status, "trainer.eval_strategy=steps" in finished.err) == (1, True)


def test_run_on_relative_paths_is_opened_and_resumed_from_another_folder(
    cli: Callable[..., Finished], tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    shutil.copy(rows, tmp_path / "rows.jsonl")
    overrides = ["model=hub", "model.path=base", "data=jsonl", "data.train=rows.jsonl", "task.samples=0"]
    overrides += ["trainer.max_steps=4", "trainer.save_steps=2", "trainer.per_device_train_batch_size=4"]
    monkeypatch.chdir(tmp_path)
    assert cli(*overrides, "hydra.run.dir=run").status == 0
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    (tmp_path / "broken" / "result.json").unlink()
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "broken" / name)
    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for command in (
        ("predict", "../run", "text=say", "max_new_tokens=2"),
        ("evaluate", "../run"),
        ("resume", "../broken"),
    ):
        finished = cli(*command)
        assert finished.status == 0, finished.err
    assert "Changed since" not in finished.out
    assert differences(tmp_path / "broken", tmp_path / "run") == ["config_hash"]  # the path is spelt otherwise
