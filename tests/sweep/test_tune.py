"""`tune`: a search for rate and ratio, its answer, and the same answer after a stop."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.interrupts import Interrupted
from loraplus_hydra.runs import job
from loraplus_hydra.sweep import finish as sweep_end
from loraplus_hydra.sweep import tune_search
from loraplus_hydra.sweep.tuning import Settings
from tests.conftest import Finished
from tests.support.forking import differences

Cli = Callable[..., Finished]
SEARCH = ["tune.eta_B=[1e-3,4e-3]", "tune.ratios=[1,8]"]


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """The overrides of a search of four candidates with 16 steps: rungs at 6 (two stay) and 8 (the finalists)."""
    changes = ["trainer.max_steps=16", "trainer.eval_strategy=no", "task.samples=0", "data.eval_fraction=0.5"]
    return [*tiny_run, *changes, *SEARCH]


def the_sweep(place: Path) -> Path:
    (folder,) = (place / "outputs" / "sweeps").iterdir()
    return folder


def results(sweep: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name.rpartition("_")[0]: json.loads(path.read_text()) for path in sweep.glob("*/result.json")}


def test_search_finds_a_winner_and_says_how(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, begun = job._run, []

    def stopped_in_the_sixth(*arguments: Any) -> None:
        begun.append(1)
        if len(begun) == 6:  # a finalist's second seed
            raise Interrupted(signal.SIGINT)
        run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job, "_run", stopped_in_the_sixth)
        patch.setattr(sweep_end, "_report", lambda _: ())
        assert cli("tune", *words).status == 130
    sweep = the_sweep(tmp_path)
    assert sweep.name.startswith("tune_")
    assert not (sweep / "tune.json").exists()

    finished = cli("tune", *words)
    assert finished.status == 0, finished.out[-3000:]
    told = json.loads((sweep / "tune.json").read_text())
    (first,) = told["rungs"][:-1]
    assert (first["step"], first["keep"], len(first["candidates"])) == (6, 2, 4)
    assert (told["step"], told["steps"], told["seeds"]) == (8, 16, [0, 1, 2])
    values = [one["values"] for one in told["finalists"]]
    assert [len(each) for each in values] == [3, 3]
    by_hand = [second - first for first, second in zip(*values, strict=True)]
    assert told["verdict"]["difference"] == pytest.approx(sum(by_hand) / 3)
    chosen = min(told["finalists"], key=lambda one: one["ratio"])
    best = told["finalists"][0] if told["verdict"]["is_clear"] else chosen
    assert told["winner"]["overrides"] == [
        f"optimizer.lr={best['eta_B'] / best['ratio']:.6g}",
        f"loraplus.ratio={best['ratio']:.6g}",
    ]
    # All steps are counted, those of the finalists' other seeds too: 4 x 6, 2 x 2, 2 x 2 x 8 and 8
    found = results(sweep)
    assert sum(one["steps"] for one in found.values()) == 24 + 4 + 32 + 8 == round(told["cost"] * 16)
    assert sorted(one["status"] for one in found.values()) == ["ok", *["pruned"] * 7]
    # The answer is the first thing in the report, and can be composed
    page = (sweep / "report.html").read_text()
    assert told["answer"][0] in finished.out.replace("\n", " ")
    edge = "At the grid's edge: eta_B 4e-3 is the largest value. Extend to 0.016."
    assert (edge in told["answer"]) == (told["winner"]["eta_B"] == 4e-3)
    assert any(text.startswith("16 steps: the best rate of a short run is about") for text in told["answer"])
    assert page.index(told["answer"][0].split(" (")[0]) < page.index("What was run")
    assert (sweep / "rungs.png").is_file()
    assert "Skipped folders" not in page
    composed = cli("--config-dir", str(sweep), "experiment=tuned", "--cfg", "job")
    config = yaml.safe_load(composed.out)
    assert config["loraplus"]["ratio"] == best["ratio"]
    assert config["optimizer"]["lr"] == pytest.approx(best["eta_B"] / best["ratio"])
    # The winner is the unbroken run of its own config
    alone = [word for word in words if not word.startswith("tune.")]
    assert cli(*alone, *told["winner"]["overrides"], "hydra.run.dir=unbroken").status == 0
    (trained,) = (path.parent for path in sweep.glob("*/adapter"))
    assert differences(trained, tmp_path / "unbroken") == []

    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    (sweep / "tune.json").write_text("damaged")
    again = cli("tune", *words)
    assert "8 jobs: 1 done before, 7 pruned" in again.out
    assert "Resuming" not in again.out
    assert json.loads((sweep / "tune.json").read_text()) == told


def test_searches_share_a_folder_unless_their_first_seeds_differ(
    cli: Cli, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finalists' other seeds have no early rungs, so a search that begins with such a seed can't use them."""
    folders: list[Path] = []

    def no_jobs(settings: Settings, words: Any, folder: Path, start: str) -> Iterator[Any]:
        folders.append(folder)
        return iter(())

    monkeypatch.setattr(tune_search, "batches", no_jobs)
    for more in ([], ["tune.eta_B=[1e-3,2e-3]", "optimizer.lr=1e-4"], ["seed=1"]):
        assert cli("tune", *words, *more).status == 0
    assert folders[0] == folders[1] != folders[2]


def test_extension_of_a_search_is_the_same_search_with_more_candidates(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    assert cli("tune", *words, "tune.eta_B=[1e-3,2e-3,4e-3]", "tune.ratios=[1]", "tune.seeds=2").status == 0
    told = json.loads((the_sweep(tmp_path) / "tune.json").read_text())
    assert told["winner"]["eta_B"] == 4e-3  # at these rates nothing but speed counts
    assert "At the grid's edge: eta_B 4e-3 is the largest value. Extend to 8e-3." in told["answer"]
    searches: list[tuple[Path, Settings]] = []

    def no_jobs(settings: Settings, words: Any, folder: Path, start: str) -> Iterator[Any]:
        searches.append((folder, settings))
        return iter(())

    monkeypatch.setattr(tune_search, "batches", no_jobs)
    wider = shlex.split(told["extend"])
    assert wider[:4] == ["python", "-m", "loraplus_hydra", "tune"]
    assert cli(*wider[3:]).status == 0
    ((folder, settings),) = searches
    assert folder == the_sweep(tmp_path)
    assert [(each.eta_B, each.ratio) for each in settings.candidates] == [
        (eta_B, 1) for eta_B in (1e-3, 2e-3, 4e-3, 8e-3)
    ]
    assert settings.seeds == (0, 1)


@pytest.mark.slow
def test_wider_search_in_the_same_folder_trains_only_what_is_new(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    assert cli("tune", *words, "tune.eta_B=[1e-3,2e-3,4e-3]", "tune.ratios=[1]", "tune.seeds=2").status == 0
    sweep = the_sweep(tmp_path)
    told = json.loads((sweep / "tune.json").read_text())
    assert told["winner"]["eta_B"] == 4e-3  # at these rates nothing but speed counts
    assert "At the grid's edge: eta_B 4e-3 is the largest value. Extend to 8e-3." in told["answer"]
    before = {path: path.read_bytes() for path in sweep.glob("*/adapter/*.safetensors")}
    jobs = {path.parent.name for path in sweep.glob("*/result.json")}
    wider = shlex.split(told["extend"])
    assert wider[:4] == ["python", "-m", "loraplus_hydra", "tune"]
    finished = cli(*wider[3:])
    assert finished.status == 0, finished.out[-3000:]
    assert the_sweep(tmp_path) == sweep
    again = json.loads((sweep / "tune.json").read_text())
    assert [one["eta_B"] for one in again["candidates"]] == [1e-3, 2e-3, 4e-3, 8e-3]
    new = {path.parent.name for path in sweep.glob("*/result.json")} - jobs
    assert {name.partition("_seed")[0] for name in new} <= {"ratio-1_lr-8e-3", "ratio-1_lr-2e-3"}
    assert {path: path.read_bytes() for path in before} == before


def test_candidates_without_rungs_are_not_left_out_of_the_comparison(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    folder = f"hydra.sweep.dir={tmp_path / 'shared'}"
    plain = [word for word in words if not word.startswith("tune.")]
    assert cli("-m", *plain, "optimizer.lr=1e-3", "loraplus.ratio=1", "seed=0", folder).status == 0
    ended = cli("tune", *words, "tune.eta_B=[1e-3,4e-3,2e-2]", "tune.ratios=[1]", "tune.seeds=2", folder)
    assert ended.status == 1
    assert "jobs in this folder were trained without these rungs" in ended.err
    assert not (tmp_path / "shared" / "tune.json").exists()


def test_rungs_so_late_that_the_budget_is_too_small_are_an_error(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    kept = {tmp_path / "search" / name: name for name in ("tune.json", "experiment/tuned.yaml", "experiment/mine.yaml")}
    for path, text in kept.items():  # an earlier answer, and a file of the user
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    epochs = ["trainer.max_steps=-1", "trainer.num_train_epochs=1", f"hydra.sweep.dir={tmp_path / 'search'}"]
    ended = cli("tune", *words, *epochs)  # five steps
    assert ended.status == 1
    assert "with 5 steps and no rung before step 6, this search costs 8.0 runs, and tune.budget is 5" in ended.err
    assert "Give tune.budget=8 'tune.eta_B=[0.001,0.004]'" in ended.err
    assert {path: path.read_text() for path in kept} == kept
    refused = cli("tune", *words, "trainer.max_steps=5")  # known before anything is trained
    assert "- tune.budget: 4 candidates and 3 seeds cost 8 runs" in refused.err


def test_without_a_difference_there_is_no_clear_winner(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    finished = cli("tune", *words, "tune.eta_B=[1e-9]", "tune.ratios=[1,1.02]", "tune.seeds=2")
    assert finished.status == 0, finished.out[-3000:]
    told = json.loads((the_sweep(tmp_path) / "tune.json").read_text())
    assert not told["verdict"]["is_clear"]
    assert told["winner"]["ratio"] == 1
    assert told["answer"][0].startswith("No clear winner")


@pytest.mark.parametrize("failing", [(8,), pytest.param((1, 8), marks=pytest.mark.slow)])
def test_finalist_with_a_failed_seed_is_not_the_winner(
    failing: tuple[int, ...], cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = job.prepare

    def prepare_or_fail(config: DictConfig, **how: Any) -> Any:
        if config.seed == 1 and config.loraplus.ratio in failing:
            raise UserError("made up")
        return prepare(config, **how)

    monkeypatch.setattr(job, "prepare", prepare_or_fail)
    monkeypatch.setattr(sweep_end, "_report", lambda _: ())
    finished = cli("tune", *words, "trainer.max_steps=12", "tune.eta_B=[4e-3]", "tune.seeds=2")
    assert finished.status == 1
    sweep = the_sweep(tmp_path)
    assert (sweep / "tune.json").exists() == (failing == (8,))
    if failing == (8,):
        told = json.loads((sweep / "tune.json").read_text())
        assert told["winner"]["ratio"] == 1
        assert told["answer"][0].endswith("the only finalist without a failed job.")
        assert results(sweep)["ratio-1_lr-4e-3_seed-0"]["status"] == "ok"
    else:
        assert "all candidates failed" in finished.err


@pytest.mark.parametrize(
    ("given", "key", "what"),
    [
        (["tune", "tune.budget=2"], "tune.budget", "9 candidates and 3 seeds cost 4.125 runs"),
        # two to 1/16, 1/4 and 1/2 of the steps, one of them to its end, and two to 1/2 with the second seed
        (["tune", "tune.budget=2"], "tune.budget", "the least is 2.5, for 2 candidates and tune.seeds=2"),
        (["tune", "tune.eta_B=[1e-3]", "tune.ratios=[1]"], "tune", "there is nothing to compare"),
        (["tune", "optimizer.lr=1e-3,2e-3"], "optimizer.lr", "`tune` makes its own grid"),
        (["tune", "tune.seeds=1"], "tune.seeds", "it must be a whole number from 2 on"),
        (["tune", "tune.ratios=[1,-1]"], "tune.ratios", "is out of range"),
        (["tune", "tune.eta_B=3"], "tune.eta_B", "is not a list of numbers"),
        (["tune", "hparams_search=ratio"], "hparams_search", "is a sweep of its own"),
        (["tune", "loraplus=none", "tune.ratios=[1,2]"], "tune.ratios", "has no ratio"),
        (["tune", "tune.budgt=3"], "tune.budgt", "did you mean 'budget'?"),
        (["tune", "+tune.x=1"], "tune.x", "there is no such key"),
        (["tune", "tune=null"], "tune", "is not a mapping of keys"),
        (["tune", "tune.eta_B=1e-3,2e-3"], "tune.eta_B", "write a list: tune.eta_B=[1,4]"),
        (["tune", "trainer.max_steps=0"], "trainer.max_steps", "out of range"),
        (["tune", "~optimizer.lr"], "optimizer.lr", "`tune` sets this key, but the config doesn't have it"),
        (["tune", "loraplus.rules.groupB.ratio=16"], "loraplus.rules", "lora_B trains at 0.00704 under the rules"),
        (["tune", "hydra.mode=RUN"], "tune", "this is a single run"),
        (["tune", "halving=true"], "halving", "`tune` halves its own grid"),
        (["tune", "seed=-1"], "seed", "must be from 0 to"),
        (["tune", "optimizer.lr=x"], "tune.eta_B", "optimizer.lr is not a number above 0"),
        (["tune", "trainer.early_stopping_patience=2"], "trainer.early_stopping_patience", "at the same steps"),
        (["tune.budget=3"], "tune.budget", "write the command first: tune tune.budget=3"),
    ],
)
def test_search_that_cannot_be_made_is_refused_before_anything_is_written(
    given: list[str], key: str, what: str, cli: Cli, tmp_path: Path
) -> None:
    finished = cli(*given)
    assert finished.status == 1
    assert f"- {key}: " in finished.err
    assert what in finished.err
    assert list(tmp_path.iterdir()) == []
