"""Benchmarks of lm-evaluation-harness: the figures of a direct call on the merged model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplus_hydra.runs.finished import open_run
from tests.conftest import Finished
from tests.support.finished_runs import WORDS, finished

__all__ = ["finished"]

NAMES = ["tiny_choice", "tiny_exact", "tiny_perplexity"]
NUMBERS = ("acc,none", "acc_norm,none", "exact_match,none", "word_perplexity,none", "bits_per_byte,none")


def write_tasks(folder: Path) -> Path:
    """Three local tasks of twenty rows: a choice, an exact match, and a perplexity."""
    folder.mkdir()
    rows = [{"ask": f"say {WORDS[i % 3]} {i}", "choices": list(WORDS), "gold": i % 3} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
    (folder / "choice.yaml").write_text(f"""task: tiny_choice
{common}output_type: multiple_choice
doc_to_text: "{{{{ask}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    (folder / "exact.yaml").write_text(f"""task: tiny_exact
{common}output_type: generate_until
doc_to_text: "{{{{ask}}}}"
doc_to_target: " {{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    (folder / "perplexity.yaml").write_text(f"""task: tiny_perplexity
{common}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{ask}}}} and then the number that comes after it"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""")
    return folder


@pytest.mark.extras
def test_figures_are_those_of_a_direct_call_on_the_merged_model(
    finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks, folder = write_tasks(tmp_path / "tasks"), finished("sft")
    words = ("evaluate", str(folder), f"harness=[{','.join(NAMES)}]", f"harness_tasks={tasks}")
    ended = cli(*words, "harness_batch_size=4")
    assert ended.status == 0, ended.err
    (file,) = (folder / "harness").iterdir()
    written = json.loads(file.read_text())
    assert f"The results are in {file}" in ended.out
    base = AutoModelForCausalLM.from_pretrained(open_run(str(folder)).config.model.path)
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=merged, tokenizer=AutoTokenizer.from_pretrained(folder / "adapter"), batch_size=1),
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )["results"]
    compared = 0
    for task in NAMES:
        for number in NUMBERS:
            if number in expected[task]:
                assert written["results"][task][number] == pytest.approx(expected[task][number], rel=1e-5), number
                assert f"{expected[task][number]:.4f}" in ended.out or number.startswith(("word", "bits"))
                compared += 1
    assert compared == 5
    assert written["n-samples"]["tiny_choice"]["effective"] == 20
    assert written["step"] is None
    fewer = cli(*words, "harness_limit=7", "out=fewer.json")
    assert fewer.status == 0, fewer.err
    assert json.loads(Path("fewer.json").read_text())["n-samples"]["tiny_exact"]["effective"] == 7
    assert list((folder / "harness").iterdir()) == [file]


@pytest.mark.extras
def test_signal_stops_the_evaluation_and_leaves_nothing(
    finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    import torch

    tasks, passes = write_tasks(tmp_path / "tasks"), [0]
    forward = torch.nn.Embedding.forward

    def signalled(self: Any, *args: Any) -> Any:
        passes[0] += 1
        if passes[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)

    monkeypatch.setattr(torch.nn.Embedding, "forward", signalled)
    ended = cli("evaluate", str(finished("sft")), "harness=[tiny_exact]", f"harness_tasks={tasks}", "out=stopped.json")
    assert ended.status == 143
    assert passes[0] == 2
    assert "no results are written" in ended.err
    assert not Path("stopped.json").exists()


@pytest.mark.extras
def test_tasks_that_cannot_be_loaded_are_told_before_the_weights_load(
    finished: Callable[[str], Path], cli: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("loraplus_hydra.runs.harness.load_run", None)
    tasks, run = write_tasks(tmp_path / "tasks"), str(finished("sft"))
    of_hub = (
        (tasks / "choice.yaml").read_text().replace("tiny_choice", "of_hub").replace("path: json", "path: own/rows")
    )
    (tasks / "hub.yaml").write_text(of_hub)
    ended = cli("evaluate", run, "harness=[tiny_chioce,of_hub]", f"harness_tasks={tasks}")
    assert ended.status == 1
    assert "harness: there is no task 'tiny_chioce' (did you mean 'tiny_choice'?)" in ended.err
    ended = cli("evaluate", run, "harness=[of_hub]", f"harness_tasks={tasks}")
    assert ended.status == 1
    assert "harness: the task 'of_hub' can't be loaded: " in ended.err
    assert "load them once with network, or use a local task" in ended.err
    assert "Traceback" not in ended.err
    path = cli("evaluate", run, f"harness=['{tasks}/choice.yaml']", f"harness_tasks={tasks}")
    assert "harness: there is no task '/" in path.err


def test_wrong_input_is_told_at_once(
    finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    run = finished("sft")
    ended = cli("evaluate", str(run), "harness=[a]", f"harness_tasks={run}/adapter", "harness_chat=true")
    assert ended.status == 1
    assert "harness: this needs the package lm-eval, which isn't installed; install it: pip install '" in ended.err
    assert "harness_chat: the run's tokenizer has no chat template" in ended.err
    assert "is in the run's folder, and tasks are code, which is never read from a run" in ended.err
    classifier = cli("evaluate", str(finished("label")), "harness=[a]", "harness_tasks=nowhere")
    assert "harness: the run's model doesn't predict text" in classifier.err
    assert "harness_tasks: there is no folder nowhere" in classifier.err
    ended = cli("evaluate", str(run), "harness=[a]", "forgetting=a.txt", "harness_limit=0", "data.eval=b.jsonl")
    assert ended.status == 1
    for told in (
        "harness_limit: 0 is out of range",
        "forgetting: with `harness` no rows are evaluated",
        "data: with `harness` no rows are evaluated",
    ):
        assert told in ended.err
    ended = cli("evaluate", str(run), "harness_limit=5")
    assert "harness_limit: without `harness` it has no effect" in ended.err
