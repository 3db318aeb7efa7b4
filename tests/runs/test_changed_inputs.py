"""Content, not names: what each command does when a run's rows, weights or tokenizer are others than they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

from loraplus_hydra import run
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.inputs import base_fingerprints
from loraplus_hydra.runs.changed_inputs import current_inputs
from loraplus_hydra.tasks import examples
from tests.conftest import Finished
from tests.support.edits import edit_held_out_rows, edit_rows

Cli = Callable[..., Finished]
ALLOW = "allow_changed_inputs=true"


def edit_weights(folder: Path) -> None:
    """Change one number of one tensor."""
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][17, 5] += 0.5
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder: Path) -> None:
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-4}))


def edit_template(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )


def edit_adapter(folder: Path) -> None:
    for name in ("done", "stopped"):
        file = folder / name / "adapter" / "chat_template.jinja"
        if file.parent.is_dir():
            file.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")


COMMANDS = {
    "resume": ("resume", "stopped"),
    "evaluate": ("evaluate", "done"),
    "predict": ("predict", "done", "text=say", "max_new_tokens=1"),
    "export": ("export", "done", "to=out", "merge=false"),
}
# What was edited: the key under which each command refuses it; a command that isn't named does not read it.
TABLE: list[tuple[Callable[[Path], None], dict[str, str]]] = [
    (edit_rows, {"resume": "data.train"}),
    (edit_held_out_rows, {"resume": "data.eval", "evaluate": "data.eval"}),
    (edit_weights, dict.fromkeys(COMMANDS, "model.path")),
    (edit_config, dict.fromkeys(COMMANDS, "model.path")),
    (edit_template, {"resume": "model.tokenizer"}),
    (edit_adapter, dict.fromkeys(("evaluate", "predict", "export"), "run")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_moved_folder_and_other_names_are_the_same_content(command: str, copy: Path, cli: Cli) -> None:
    (copy / "model").rename(copy / "base")
    (copy / "rows.jsonl").rename(copy / "renamed.json")
    for file in copy.glob("*/config.yaml"):
        file.write_text(file.read_text().replace("rows.jsonl", "renamed.json").replace(f"{copy}/model", f"{copy}/base"))
    finished = cli(*COMMANDS[command])
    assert finished.status == 0, finished.err
    assert "hanged since" not in finished.out + finished.err


@pytest.mark.parametrize(("edit", "refused"), TABLE, ids=[edit.__name__ for edit, _ in TABLE])
def test_changed_content_is_named_and_refused_unless_it_is_allowed(
    edit: Callable[[Path], None], refused: dict[str, str], copy: Path, cli: Cli
) -> None:
    edit(copy)
    for name, command in COMMANDS.items():
        before = sorted((copy / command[1]).rglob("*"))
        finished = cli(*command)
        if name not in refused:
            assert finished.status == 0, (name, finished.err)
            continue
        assert finished.status == 1, (name, finished.out)
        assert refused[name] in finished.err, (name, finished.err)
        assert "changed since" in finished.err, (name, finished.err)
        assert ALLOW in finished.err.replace("\n", ""), finished.err
        assert sorted((copy / command[1]).rglob("*")) == before
        allowed = cli(*command, ALLOW)
        assert allowed.status == 0, (name, allowed.err)


OFFERED = {"train": "say one", "eval": "say two"}  # what `rows_of_a_function` returns


def rows_of_a_function() -> DatasetDict:
    splits = {name: Dataset.from_list([{"prompt": text, "completion": " x"}] * 4) for name, text in OFFERED.items()}
    return DatasetDict(splits)


def test_each_input_has_a_fingerprint_of_its_own(
    copy: Path, compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = copy / "turns.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    overrides = [
        *("model=hub", f"model.path={copy / 'model'}", "adapter=existing", f"adapter.path={copy / 'done'}"),
        *("~data", "+data._target_=tests.runs.test_changed_inputs.rows_of_a_function"),
        f"+task.args.chat_template_path={template}",
    ]
    config = compose(*overrides)
    before = current_inputs(config)

    def changed() -> set[str]:
        examples._kept.clear()
        now = current_inputs(config)
        assert now.keys() == before.keys()
        return {name for name in now if now[name] != before[name]}

    assert changed() == set()
    monkeypatch.setitem(OFFERED, "train", "say three")
    assert changed() == {"data.train"}
    monkeypatch.setitem(OFFERED, "eval", "say three")
    assert changed() == {"data.train", "data.eval"}
    template.write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
    assert changed() == {"data.train", "data.eval", "tokenizer"}
    edit_weights(copy)
    edit_config(copy)
    assert changed() == {"data.train", "data.eval", "tokenizer", "weights", "config.json"}
    file = copy / "done" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert changed() == before.keys()


def test_weights_in_shards_or_in_the_hubs_cache_are_the_same(
    tiny_model: Path, tmp_path: Path, compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    expected = base_fingerprints(compose("model=hub", f"model.path={tiny_model}").model)
    assert expected.keys() == {"weights", "config.json"}
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert base_fingerprints(compose("model=hub", f"model.path={tmp_path / 'sharded'}").model) == expected
    repository = tmp_path / "models--a--b"
    for file in (tmp_path / "sharded").iterdir():  # a link for each file, as the hub's client makes them
        blob = repository / "blobs" / file.name.replace(".", "")
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = repository / "snapshots" / "0123" / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_fingerprints(compose("model=hub", "model.path=a/b").model) == expected
    assert base_fingerprints(compose("model=hub", "model.path=a/c").model) == {}


def test_run_of_another_folder_is_continued_with_its_content(
    copy: Path, compose: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        *("model=hub", f"model.path={copy / 'model'}", "data=jsonl", f"data.train={copy / 'rows.jsonl'}"),
        *(f"data.eval={copy / 'held_out.jsonl'}", "trainer.max_steps=3", "task.samples=0", "trainer.eval_strategy=no"),
        f"trainer.resume_from_checkpoint={copy / 'stopped' / 'checkpoints' / 'checkpoint-2'}",
    ]
    edit_rows(copy)
    with pytest.raises(ConfigErrors, match=r"data\.train: the content of the training rows has changed"):
        run(compose(*overrides, "trainer.per_device_train_batch_size=4"), copy / "new")
    assert not (copy / "new" / "config.yaml").exists()
    (copy / "rows.jsonl").rename(copy / "others.jsonl")
    overrides[3] = f"data.train={copy / 'others.jsonl'}"  # rows of its own
    run(compose(*overrides, "trainer.per_device_train_batch_size=4"), copy / "new")


def test_rows_accepted_before_a_kill_are_accepted_by_the_next_resume(
    copy: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplus_hydra.runs import job

    def killed(*args: Any, **how: Any) -> None:
        raise SystemExit(9)

    edit_rows(copy)
    with monkeypatch.context() as patched:
        patched.setattr(job, "prepare", killed)
        assert cli("resume", "stopped", ALLOW).status == 9
    assert cli("resume", "stopped").status == 0


def test_run_without_fingerprints_is_resumed_with_a_note(copy: Path, cli: Cli) -> None:
    from loraplus_hydra.io.checkpoints import seal

    edit_rows(copy)
    checkpoint = copy / "stopped" / "checkpoints" / "checkpoint-2"
    state = json.loads((checkpoint / "run_state.json").read_text())
    del state["inputs"], state["stream"]
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    seal(checkpoint)
    finished = cli("resume", str(copy / "stopped"))
    assert finished.status == 0, finished.err
    assert finished.out.count("the run stored no fingerprints") == 1


def test_job_that_was_done_with_other_content_is_not_done(copy: Path, cli: Cli) -> None:
    sweep = [
        *("-m", "seed=0,1", "model=hub", "model.path=model", "data=jsonl", "data.train=rows.jsonl"),
        *("data.eval=held_out.jsonl", "trainer.max_steps=1", "trainer.eval_strategy=no", "task.samples=0"),
        "hydra.sweep.dir=sweep",
    ]
    assert cli(*sweep).status == 0
    (copy / "rows.jsonl").touch()
    again = cli(*sweep)
    assert again.status == 0, again.err
    assert again.out.count("Done before") == 2
    edit_rows(copy)
    before = {path: path.stat().st_mtime_ns for path in (copy / "sweep").glob("seed*/*")}
    refused = cli(*sweep)
    assert refused.status == 1
    assert refused.out.count("content of the training rows has changed since") >= 2, refused.out
    assert {path: path.stat().st_mtime_ns for path in (copy / "sweep").glob("seed*/*")} == before
    allowed = cli(*sweep, ALLOW)
    assert allowed.status == 0, allowed.err
    assert allowed.out.count("Done before") == 2
