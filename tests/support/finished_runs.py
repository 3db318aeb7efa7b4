"""Finished runs of tiny models for the tests of commands that open one; each trained once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.architectures import checkpoint

NO_PLACE = pytest.param("/proc", marks=pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc"))
WORDS = ("one", "two", "three")
TEMPLATE = (
    "{%- for message in messages -%}{{ '<' + message['role'] + '>' + message['content'] }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)


def write_rows(folder: Path) -> None:
    """rows.jsonl for sft, and for classifiers labels.csv (one label), tags.jsonl (several), scores.csv, pairs.csv."""
    count = range(24)
    sft = [{"prompt": f"say {WORDS[i % 3]} {i}", "completion": f" {WORDS[i % 3]}"} for i in count]
    tags = [{"text": f"say {i}", "label": [WORDS[i % 3], WORDS[(i + i % 2) % 3]][: 1 + i % 2]} for i in count]
    for name, lines in (("rows", sft), ("tags", tags)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "labels.csv").write_text(
        "text,label\n" + "".join(f"say {WORDS[i % 3]} {i},{WORDS[i % 3]}\n" for i in count)
    )
    (folder / "scores.csv").write_text("text,label\n" + "".join(f"say {i},{i / 24}\n" for i in count))
    pairs = "".join(f"say {WORDS[i % 3]},say {WORDS[i % 2]},{'same' if i % 3 == i % 2 else 'other'}\n" for i in count)
    (folder / "pairs.csv").write_text("text,second,label\n" + pairs)
    (folder / "book.txt").write_text("say one two three four five six seven\n" * 40)


# name -> architecture, chat template, overrides; DATA stands for the folder of write_rows
RUNS: dict[str, tuple[str, bool, list[str]]] = {
    "sft": ("llama", False, ["data=jsonl", "data.train=DATA/rows.jsonl"]),
    "chat": ("qwen2", True, ["data=jsonl", "data.train=DATA/rows.jsonl"]),
    "text": ("gpt2", True, ["task=text", "data=text", "data.train=DATA/book.txt", "task.block_size=16"]),
    "label": ("bert", False, ["task=classification", "data=csv", "data.train=DATA/labels.csv"]),
    "label, causal": ("llama", False, ["task=classification", "data=csv", "data.train=DATA/labels.csv"]),
    "several": ("bert", False, ["task=classification", "data=jsonl", "data.train=DATA/tags.jsonl"]),
    "number": (
        "bert",
        False,
        [
            *("task=classification", "data=csv", "data.train=DATA/scores.csv"),
            *("task.problem_type=regression", "task.metric=eval_pearson"),
        ],
    ),
    "pair": (
        "roberta",
        False,
        ["task=classification", "data=csv", "data.train=DATA/pairs.csv", "data.text_pair_column=second"],
    ),
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of RUNS; the rows are in `data` two folders up."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra import run
    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register

    place = tmp_path_factory.mktemp("finished")
    (place / "data").mkdir()
    write_rows(place / "data")

    def folder(name: str) -> Path:
        here = place / name.replace(", ", "_")
        if (here / "run").exists():
            return here / "run"
        architecture, chat, overrides = RUNS[name]
        base = checkpoint(architecture, here / "base")
        if chat:
            (base / "chat_template.jinja").write_text(TEMPLATE)
        common = ["model=hub", f"model.path={base}", "trainer.max_steps=3", "optimizer.lr=5e-3"]
        if "task=classification" not in overrides:
            common.append("task.samples=0")
        register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            written = [text.replace("DATA", str(place / "data")) for text in overrides]
            config = compose("config", overrides=[*common, *written])
        run(config, here / "run")
        return here / "run"

    return folder
