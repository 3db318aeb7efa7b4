"""Answers computed in batches, and those of the merged model, are the answers of `generate` to one prompt at a time."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from loraplus_hydra import run as train
from loraplus_hydra.runs.chat import Chat
from loraplus_hydra.runs.export import export
from loraplus_hydra.runs.finished import FinishedRun, open_run
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.runs.predict import predict
from loraplus_hydra.training import sampling
from tests.conftest import Finished
from tests.support.finished_runs import finished

__all__ = ["finished"]

# Of many lengths, so that most have padding; the last is longer than gpt2's positions with its answer
TEXTS = [
    "say",
    "say one",
    "say one two three four five six seven",
    "and then the number",
    "again " * 9,
    "say two " * 40,
]
TOKENS = 12


def by_peft(run: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The run's model and tokenizer, as transformers and PEFT alone load them."""
    base = AutoModelForCausalLM.from_pretrained(open_run(str(run)).config.model.path)
    return PeftModel.from_pretrained(base, run / "adapter").eval(), AutoTokenizer.from_pretrained(run / "adapter")


def generated(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> Any:
    """What `generate` makes of one text: sequences and logits, without the prompt's tokens."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    table = getattr(model.config, "n_positions", None)
    ids = ids if table is None else ids[:, -(table - TOKENS) :]
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, **settings}
    out = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences[0, ids.shape[1] :], out.logits


def texts_of(run: FinishedRun, **settings: Any) -> list[str]:
    return [line["answer"] for line in predict(run, TEXTS, max_new_tokens=TOKENS, **settings)]


@pytest.mark.parametrize(("name", "form"), [("sft", "{}"), ("chat", "<user>{}<assistant>"), ("text", "{}")])
def test_answers_are_those_of_generate_one_by_one(name: str, form: str, finished: Callable[[str], Path]) -> None:
    folder = finished(name)
    model, tokenizer = by_peft(folder)
    expected = [
        tokenizer.decode(generated(model, tokenizer, form.format(text))[0], skip_special_tokens=True) for text in TEXTS
    ]
    assert len(set(expected)) > 2
    run = open_run(str(folder))
    for batch_size in (None, 1, 4):
        assert texts_of(run, batch_size=batch_size) == expected, batch_size


def test_answers_end_with_the_end_that_was_trained(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["+task.args.eos_token='!'", "optimizer.lr=5e-2", "task.sample_tokens=8", "trainer.max_steps=12"]
    result = train(compose(*tiny_run, *words), tmp_path / "run")
    (sample,) = result.samples
    said, end, rest = sample["after"].partition("!")
    assert (end, rest) == ("!", "")
    opened = open_run(str(tmp_path / "run"))
    (answer,) = predict(opened, [sample["prompt"]], max_new_tokens=8)
    assert answer["answer"].removesuffix("!").split() == said.split()
    folder = export(opened, tmp_path / "merged")
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens, _ = generated(merged, tokenizer, sample["prompt"])
    assert tokenizer.decode(tokens).removesuffix("!").split() == said.split()


@pytest.mark.parametrize(("name", "form"), [("sft", "{}"), ("chat", "<user>{}<assistant>")])
def test_answers_of_the_merged_model_agree_up_to_a_tie(name: str, form: str, finished: Callable[[str], Path]) -> None:
    folder = finished(name)
    run = open_run(str(folder))
    model, tokenizer = by_peft(folder)
    answers = {text: [answer] for text, answer in zip(TEXTS, texts_of(run), strict=True)}
    for text in TEXTS[:2]:
        answers[text].append(Chat(run, system=None, max_new_tokens=TOKENS, temperature=0, top_p=1).ask(text))
    merged, compared = model.merge_and_unload(), 0
    for text, given in answers.items():
        tokens, logits = generated(merged, tokenizer, form.format(text))
        best = torch.cat(logits).topk(2).values
        ties = (best[:, 0] - best[:, 1] < 1e-3).nonzero()
        sure = tokens[: ties[0].item() if len(ties) else len(tokens)]
        assert all(answer.startswith(tokenizer.decode(sure, skip_special_tokens=True)) for answer in given)
        compared += len(sure)
    assert compared > TOKENS


def test_answer_with_a_tie_is_computed_again_alone(
    finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(str(finished("sft")))
    rows: list[int] = []
    alone = sampling._generate

    def counted(model: Any, tokenizer: Any, prompts: Any, *rest: Any, **settings: Any) -> Any:
        rows.append(len(prompts))
        return alone(model, tokenizer, prompts, *rest, **settings)

    monkeypatch.setattr(sampling, "_generate", counted)
    monkeypatch.setattr(sampling, "_NEAR_TIE", 0.0)
    apart = texts_of(run, batch_size=3)
    assert rows == [3, 3]
    monkeypatch.setattr(sampling, "_NEAR_TIE", 1e9)
    assert texts_of(run, batch_size=3) == apart
    assert rows[2:] == [3, 1, 1, 1, 3, 1, 1, 1]


def test_padding_that_would_be_counted_is_not_used(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished("sft")
    base = shutil.copytree(open_run(str(folder)).config.model.path, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"repetition_penalty": 3.0, "eos_token_id": 1}))
    run = open_run(str(folder), {"model": {"path": str(base)}})
    model, tokenizer = by_peft(folder)
    model.generation_config.repetition_penalty = 3.0
    expected = [tokenizer.decode(generated(model, tokenizer, text)[0], skip_special_tokens=True) for text in TEXTS]
    assert texts_of(run) == expected
    assert "Note" not in capsys.readouterr().err
    assert texts_of(run, batch_size=4) == expected
    told = capsys.readouterr().err
    assert "batch_size: the texts are answered one at a time, because the model's generation_config sets" in told
    assert "repetition_penalty" in told
    model, _ = load_run(open_run(str(folder)))
    assert sampling.padding_problem(model) == ""


def test_lower_precision_is_answered_one_at_a_time_unless_a_batch_is_asked_for(finished: Callable[[str], Path]) -> None:
    from loraplus_hydra.runs.predict import _batch_size

    model, _ = load_run(open_run(str(finished("text"))))
    assert [_batch_size(model, wanted, most=9) for wanted in (None, 1, 5)] == [8, 1, 5]
    model.to(torch.bfloat16)
    assert [_batch_size(model, wanted, most=9) for wanted in (None, 1, 5)] == [1, 1, 5]


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(
    finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(finished("sft"))
    Path("asked.txt").write_text("say one\nsay two\nsay three\n")
    words = ("predict", run, "file=asked.txt", "max_new_tokens=3", "batch_size=2")
    plain = cli(*words)
    assert [json.loads(line)["prompt"] for line in plain.out.splitlines()] == ["say one", "say two", "say three"]
    assert "rows" not in plain.err
    from loraplus_hydra.io.screen import RowProgress

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    long = json.dumps({"answer": "[b]a word[/b] :smile: " * 20})
    with RowProgress(3) as progress:
        progress.print(long)
        progress.advance(2)
        progress.bar.refresh()
    shown = terminal.getvalue()
    assert long in shown
    assert "2 of 3 rows" in shown
    assert "rows/s  0:00 left" in shown
