"""What a resume may not do: lose what a run has, follow what somebody else's run says, or record what isn't so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra import run
from loraplus_hydra.check import check
from loraplus_hydra.errors import ConfigErrors, UserError
from loraplus_hydra.io.locks import folder_lock
from loraplus_hydra.runs.resume import find_resume_point, roll_back
from tests.conftest import Finished
from tests.runs.conftest import AUTO, Trial
from tests.runs.test_resume import files
from tests.support.forking import differences

Cli = Callable[..., Finished]
TO_EIGHT = ("trainer.max_steps=8", "trainer.save_steps=2")


@pytest.mark.parametrize("result", ["whole", "truncated", "missing"])
def test_finished_run_without_checkpoints_is_not_replaced(result: str, cli: Cli, trained: Path) -> None:
    shutil.rmtree(trained / "checkpoints")  # as trainer.save_strategy=no leaves it
    if result == "truncated":
        (trained / "result.json").write_text((trained / "result.json").read_text()[:40])
    elif result == "missing":
        (trained / "result.json").unlink()
    before = files(trained)
    finished = cli("resume", "run", "trainer.max_steps=8")
    assert (finished.status, "has no checkpoint, but the adapter run/adapter" in finished.err) == (1, True), (
        finished.err
    )
    assert files(trained) == before


def test_a_resume_that_ends_before_it_has_changed_anything_keeps_the_result(
    cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    before = files(trained)
    monkeypatch.setattr("loraplus_hydra.runs.job.reset_peak_memory", interrupted)
    assert cli("resume", "run", *TO_EIGHT).status != 0
    after = files(trained)
    assert {path for path in before if after[path] != before[path]} == {trained / "loraplus_hydra.log"}


def test_run_whose_checkpoints_are_all_damaged_is_not_replaced(cli: Cli, trained: Path) -> None:
    for state in trained.glob("checkpoints/*/trainer_state.json"):
        state.write_text("{")
    before = files(trained)
    finished = cli("resume", "run", "trainer.max_steps=8")
    assert (finished.status, "run has no complete checkpoint" in finished.err) == (1, True), finished.err
    assert files(trained) == before


@pytest.mark.parametrize(
    "changes",
    [
        ("loraplus.ratio=2",),
        ("loraplus.ratio=2", "trainer.num_train_epochs=99"),  # max_steps=4 decides
        ("trainer.num_train_epochs=99",),
        ("trainer.max_steps=-1", "trainer.num_train_epochs=0.4", "loraplus.ratio=2"),  # 4 of the 10 steps of an epoch
        ("trainer.max_grad_norm=0.5",),
        ("task.args.max_length=64",),
    ],
    ids=" ".join,
)
def test_changes_that_come_after_the_last_step_are_refused(changes: tuple[str, ...], cli: Cli, trained: Path) -> None:
    before = files(trained)
    finished = cli("resume", "run", *changes)
    assert (finished.status, "all 4 steps are done" in finished.err) == (1, True), finished.err
    assert changes[-1].partition("=")[0] in finished.err
    assert files(trained) == before


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        (("trainer.per_device_eval_batch_size=2", "trainer.use_cpu=true", "task.samples=0"), 4),
        (("trainer.max_steps=-1", "trainer.num_train_epochs=0.5", "loraplus.ratio=2"), 5),
    ],
)
def test_after_the_last_step_more_steps_and_another_evaluation_are_possible(
    changes: tuple[str, ...], step: int, cli: Cli, trained: Path
) -> None:
    finished = cli("resume", "run", *changes)
    assert finished.status == 0, finished.err
    assert json.loads((trained / "result.json").read_text())["steps"] == step


def test_run_that_is_ended_at_its_checkpoint_has_no_other_rates(cli: Cli, trained: Path) -> None:
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(trained / name)
    (trained / "result.json").unlink()
    finished = cli("resume", "run", "trainer.max_steps=2", "loraplus.ratio=2")
    assert (finished.status, "all 2 steps are done" in finished.err) == (1, True), finished.err
    assert cli("resume", "run", "trainer.max_steps=2").status == 0
    assert json.loads((trained / "result.json").read_text())["steps"] == 2


def test_run_at_work_keeps_what_was_asked_for(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    command = [*tiny_run, *TO_EIGHT, "hydra.run.dir=run"]
    assert cli(*command).status == 0
    before = files(tmp_path / "run")
    with folder_lock(tmp_path / "run"):
        finished = cli(*command, "loraplus.ratio=2", "trainer.max_steps=12", AUTO)
    assert (finished.status, "a run is active" in finished.err) == (1, True), finished.err
    assert files(tmp_path / "run") == before


def test_run_that_goes_on_no_longer_says_that_it_ended_well(
    stopped: Callable[..., None],
    compose: Callable[..., Any],
    tiny_run: list[str],
    tmp_path: Path,
) -> None:
    overrides = [*tiny_run, "trainer.save_steps=2"]
    run(compose(*overrides), tmp_path / "run")
    stopped(tmp_path / "run", *overrides, "trainer.max_steps=8", AUTO, at=6)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["resumed_at"]) == ("interrupted", [4])


@pytest.mark.parametrize("place", ["model.tokenizer", "seed", "adapter.r"])
def test_no_variable_of_the_environment_is_read_for_somebody_elses_run(
    place: str, cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    monkeypatch.setenv("A_SECRET", "top-secret")
    for stored in (trained / ".hydra" / "config.yaml", trained / "config.yaml"):
        config = OmegaConf.load(stored)
        OmegaConf.update(config, place, "${oc.env:A_SECRET}")
        stored.write_text(OmegaConf.to_yaml(config))
        finished = cli("resume", "run", "trainer.max_steps=6")
        assert "top-secret" not in finished.out + finished.err
    assert finished.status == 1
    assert "is not resolved" in finished.err


def test_own_variable_in_a_command_has_the_value_that_it_had(
    cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_DTYPE", "float32")
    assert cli(*tiny_run, "trainer.save_steps=2", "hydra.run.dir=run", "model.dtype=${oc.env:A_DTYPE}").status == 0
    monkeypatch.setenv("A_DTYPE", "bfloat16")
    finished = cli("resume", "run", "trainer.max_steps=6")
    assert finished.status == 0, finished.err
    assert "model.dtype" not in finished.out


def test_aliases_in_the_resolved_config_are_refused(cli: Cli, trained: Path) -> None:
    with (trained / "config.yaml").open("a") as file:
        file.write("a: &a [x]\nb: *a\n")
    finished = cli("resume", "run", "trainer.max_steps=6")
    assert (finished.status, "aliases" in finished.err) == (1, True), finished.err


def test_first_save_of_a_run_begun_from_anothers_checkpoint_may_be_cut_short(
    compose: Callable[..., Any], cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    run(compose(*tiny_run, *TO_EIGHT, "trainer.save_total_limit=null"), tmp_path / "first")
    named = f"trainer.resume_from_checkpoint={tmp_path / 'first' / 'checkpoints' / 'checkpoint-4'}"
    assert cli(*tiny_run, *TO_EIGHT, "trainer.save_total_limit=null", named, "hydra.run.dir=run").status == 0
    for name in ("adapter", "checkpoints/checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoints" / "checkpoint-6" / "manifest.json").unlink()  # killed there
    finished = cli("resume", "run")
    assert finished.status == 0, finished.err
    assert "Resuming: from step 4" in finished.out
    assert differences(tmp_path / "run", tmp_path / "first") == []


def test_checkpoint_of_another_run_is_no_way_into_a_used_folder(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    run(compose(*tiny_run, "trainer.save_steps=2"), tmp_path / "first")
    run(compose(*tiny_run, "trainer.save_steps=2", "seed=2"), tmp_path / "mine")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "mine").rglob("*")) if path.is_file()}
    named = f"trainer.resume_from_checkpoint={tmp_path / 'first' / 'checkpoints' / 'checkpoint-2'}"
    with pytest.raises(UserError, match="a run never overwrites another"):
        run(compose(*tiny_run, named), tmp_path / "mine")
    assert {path: path.read_bytes() for path in sorted((tmp_path / "mine").rglob("*")) if path.is_file()} == before


def test_killed_while_it_is_brought_back_a_run_is_brought_back_again(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_run, *TO_EIGHT, "trainer.save_total_limit=null"]
    folder = tmp_path / "run"
    run(compose(*overrides), folder)
    shutil.copytree(folder, tmp_path / "unbroken")
    config = compose(*overrides, f"trainer.resume_from_checkpoint={folder / 'checkpoints' / 'checkpoint-4'}")
    (folder / "result.json").unlink()
    point = find_resume_point(check(config), folder)
    assert point is not None
    with monkeypatch.context() as patch:
        patch.setattr("loraplus_hydra.io.files.truncate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            roll_back(point, folder)
    run(compose(*overrides, AUTO), folder)
    assert differences(folder, tmp_path / "unbroken") == []


def test_checkpoint_of_another_branch_is_refused(
    compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, *TO_EIGHT, "trainer.save_total_limit=null"]
    folder = tmp_path / "run"
    run(compose(*overrides), folder)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step"', '"step" ', 1))  # written anew since
    with pytest.raises(UserError, match=r"does not belong to checkpoint-8"):
        find_resume_point(check(compose(*overrides, "trainer.max_steps=12", AUTO)), folder)


def test_folder_with_an_equals_sign_is_named_without_a_key(cli: Cli, trained: Path, tmp_path: Path) -> None:
    trained.rename(tmp_path / "lr=1")
    finished = cli("resume", "lr=1", "trainer.max_steps=5")
    assert finished.status == 0, finished.err


def test_used_folder_says_how_to_go_on(cli: Cli, tiny_run: list[str]) -> None:
    assert cli(*tiny_run, "hydra.run.dir=my run").status == 0
    assert "python -m loraplus_hydra resume 'my run'" in cli(*tiny_run, "hydra.run.dir=my run").err


def test_first_start_of_a_command_for_a_cluster_is_no_resume(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    finished = cli(*tiny_run, AUTO, "hydra.run.dir=run")
    assert finished.status == 0
    assert "Resuming" not in finished.out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_at"] == []


def test_start_that_changes_the_base_stays_the_runs(cli: Cli, tiny_run: list[str], trained: Path) -> None:
    """A checkpoint's A and B fit only the base without the part that the start took out of it."""
    assert cli(*tiny_run, "adapter=pissa", "trainer.save_steps=2", "hydra.run.dir=low").status == 0
    for name, then, now in (("low", "pissa", "true"), ("low", "pissa", "olora"), ("run", "True", "pissa")):
        before = files(trained.parent / name)
        finished = cli("resume", name, "trainer.max_steps=6", f"adapter.init_lora_weights={now}")
        message = f"adapter.init_lora_weights: is {now.title() if now == 'true' else now}, but the run started with"
        assert (finished.status, f"{message} {then}" in finished.err) == (1, True), finished.err
        assert files(trained.parent / name) == before
    finished = cli("resume", "low", "trainer.max_steps=6", f"adapter.path={trained}")
    assert (finished.status, "the run started with pissa" in finished.err) == (1, True), finished.err
    assert cli("resume", "low", "trainer.max_steps=6").status == 0


def test_seed_of_a_random_start_that_changes_the_base_stays_the_runs(cli: Cli, tiny_run: list[str]) -> None:
    random = ["adapter=pissa", "adapter.init_lora_weights=pissa_niter_4", "trainer.save_steps=2"]
    command = [*tiny_run, *random, "hydra.run.dir=fast"]
    assert cli(*command).status == 0
    finished = cli("resume", "fast", "seed=7")
    assert finished.err == "1 error:\n  - seed: can't be changed by a resume; leave it out, or start a new run\n"
    finished = cli(*command, "trainer.resume_from_checkpoint=auto", "trainer.max_steps=6", "seed=7")
    told = "seed: decides the start pissa_niter_4, which changes the base; a start can't change after step 0"
    assert (finished.status, told in finished.err) == (1, True), finished.err
    assert cli("resume", "fast", "trainer.max_steps=6").status == 0


def test_stream_goes_on_only_with_the_same_number_of_rows_in_a_step(trial: Trial) -> None:
    streamed = (
        *("data.streaming=true", "data.eval=${data.train}", "data.max_samples=20"),
        *("trainer.max_steps=6", "trainer.per_device_train_batch_size=2"),
    )
    trial.stop(*streamed, at=3)
    more, divided = "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=1"
    with pytest.raises(ConfigErrors) as caught:
        trial.resume(*streamed, more)
    assert [problem.key for problem in caught.value.problems] == ["trainer.gradient_accumulation_steps"]
    assert trial.resume(*streamed, more, divided).steps == 6
