"""`predict`: a finished run's adapter on a text or a file, as the model has seen texts in training."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra import run as train
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.runs.predict import predict
from loraplus_hydra.training import sampling
from tests.conftest import Finished
from tests.support.architectures import checkpoint
from tests.support.finished_runs import NO_PLACE, WORDS, finished, write_rows

__all__ = ["finished"]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "seen"), [("sft", "say one"), ("chat", "<user>say one<assistant>"), ("text", "say one")]
)
def test_answer_is_the_models_greedy_one_to_the_prompt_as_it_was_trained(
    name: str, seen: str, finished: Callable[[str], Path]
) -> None:
    run = open_run(str(finished(name)))
    (answer,) = predict(run, ["say one"], max_new_tokens=5)
    model, tokenizer = load_run(run)
    ids = tokenizer(seen, return_tensors="pt")["input_ids"]
    expected = ids
    for _ in range(5):
        with torch.no_grad():
            best = model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)
        if best.item() == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer == {"prompt": "say one", "answer": text}


def test_conversations_are_gone_on_with(finished: Callable[[str], Path], cli: Callable[..., Finished]) -> None:
    turns = [{"role": "user", "content": "say one"}]
    Path("asked.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    run = str(finished("chat"))
    ended = cli("predict", run, "file=asked.jsonl", "max_new_tokens=3")
    alone = cli("predict", run, "text=say one", "max_new_tokens=3")
    assert lines(ended.out)[0]["answer"] == lines(alone.out)[0]["answer"]
    ended = cli("predict", str(finished("sft")), "file=asked.jsonl")
    assert ended.status == 1
    assert "the run's tokenizer has no chat template" in ended.err


@pytest.mark.parametrize("name", ["label", "label, causal"])
def test_classifier_gives_the_best_label_and_a_score_for_each(name: str, finished: Callable[[str], Path]) -> None:
    run = open_run(str(finished(name)))
    texts = ["say one 1", "say", "say two and three and then the number that comes after it"]
    one_by_one = [next(predict(run, [text])) for text in texts]
    together = list(predict(run, texts, batch_size=2))
    model, tokenizer = load_run(run)
    for text, alone, padded in zip(texts, one_by_one, together, strict=True):
        assert alone["text"] == padded["text"] == text
        assert set(alone["scores"]) == set(WORDS)
        assert sum(alone["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert alone["label"] == max(alone["scores"], key=alone["scores"].__getitem__)
        assert padded["scores"] == pytest.approx(alone["scores"], abs=1e-5)
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        expected = dict(zip(model.config.id2label.values(), logits.softmax(-1).tolist(), strict=True))
        assert alone["scores"] == pytest.approx(expected, abs=1e-6)


def test_scores_do_not_depend_on_the_batch_if_the_tokenizer_was_saved_for_generation(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    write_rows(tmp_path)
    base = checkpoint("gpt2", tmp_path / "base")  # its positions are absolute
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    words = ["task=classification", "data=csv", f"data.train={tmp_path}/labels.csv", "trainer.max_steps=3"]
    train(compose("model=hub", f"model.path={base}", "optimizer.lr=2e-2", *words), tmp_path / "run")
    run = open_run(str(tmp_path / "run"))
    texts = ["say one", "say two and three and four and many more", "say"]
    alone = [next(predict(run, [text]))["scores"] for text in texts]
    for one, together in zip(alone, predict(run, texts, batch_size=3), strict=True):
        assert together["scores"] == pytest.approx(one, abs=1e-5)


def test_several_labels_have_scores_of_their_own(finished: Callable[[str], Path]) -> None:
    (answer,) = predict(open_run(str(finished("several"))), ["say 1"])
    assert set(answer["scores"]) == set(WORDS)
    assert answer["label"] == [name for name, score in answer["scores"].items() if score > 0.5]


def test_regression_gives_its_number(finished: Callable[[str], Path]) -> None:
    (answer,) = predict(open_run(str(finished("number"))), ["say 1"])
    assert set(answer) == {"text", "label"}
    assert isinstance(answer["label"], float)


def test_second_text_counts(finished: Callable[[str], Path], cli: Callable[..., Finished]) -> None:
    run = open_run(str(finished("pair")))
    (same,), (other,) = (predict(run, ["say one"], [second]) for second in ("say one", "say two and three"))
    assert same["scores"] != other["scores"]
    Path("pairs.csv").write_text("text,second\nsay one,say one\nsay one,say two and three\n")
    told = lines(cli("predict", str(finished("pair")), "file=pairs.csv", "scores=true").out)
    assert [line["scores"] for line in told] == [pytest.approx(one["scores"], abs=1e-5) for one in (same, other)]
    alone = cli("predict", str(finished("pair")), "text=say one", "text_pair=say one", "scores=true")
    assert lines(alone.out)[0]["scores"] == pytest.approx(same["scores"], abs=1e-5)


def test_screen_has_label_and_score_and_the_file_all_scores(
    finished: Callable[[str], Path], cli: Callable[..., Finished]
) -> None:
    for name, several in (("label", False), ("several", True)):
        run = str(finished(name))
        full = next(predict(open_run(run), ["say one"]))
        (short,) = lines(cli("predict", run, "text=say one").out)
        scores = [full["scores"][label] for label in ([*full["label"]] if several else [full["label"]])]
        assert list(short) == ["text", "label", "score"]
        assert short["label"] == full["label"]
        assert short["score"] == pytest.approx(scores if several else scores[0], abs=1e-4)
        assert lines(cli("predict", run, "text=say one", "scores=true").out) == [full]
        cli("predict", run, "text=say one", f"out={name}.jsonl")
        assert lines(Path(f"{name}.jsonl").read_text()) == [full]
    assert list(lines(cli("predict", str(finished("number")), "text=say 1").out)[0]) == ["text", "label"]


def test_rows_that_cannot_be_read_are_told_before_the_weights_load(
    finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplus_hydra.runs.predict.load_run", None)
    Path("empty.jsonl").write_text('{"prompt": "say one"}\n{"prompt": ""}\n')
    assert "the prompt '' has no tokens" in cli("predict", str(finished("sft")), "file=empty.jsonl").err
    Path("half.jsonl").write_text('{"text": "a", "second": "b"}\n{"text": "a", "second": null}\n')
    assert "only some rows have a second text" in cli("predict", str(finished("pair")), "file=half.jsonl").err


def test_answers_so_far_are_kept_when_a_signal_comes(
    finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, batches = sampling._generate, [0]

    def signalled(*args: Any, **settings: Any) -> Any:
        batches[0] += 1
        if batches[0] % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **settings)

    monkeypatch.setattr(sampling, "_generate", signalled)
    run = str(finished("sft"))
    Path("asked.txt").write_text("say one\nsay two\nsay three\nsay four\n")
    words = ("predict", run, "file=asked.txt", "max_new_tokens=3", "batch_size=1")
    ended = cli(*words)
    assert ended.status == 143
    assert [line["prompt"] for line in lines(ended.out)] == ["say one", "say two"]
    stopped = cli(*words, "out=answers.jsonl")
    assert stopped.status == 143
    assert "The first 2 of 4 answers are in answers.jsonl.part" in stopped.err
    assert lines(Path("answers.jsonl.part").read_text()) == lines(ended.out)
    assert not Path("answers.jsonl").exists()
    Path("answers.jsonl.part").write_text("kept")
    again = cli(*words, "out=answers.jsonl")
    assert "answers are in answers.jsonl.part2" in again.err
    assert Path("answers.jsonl.part").read_text() == "kept"
    assert Path("answers.jsonl.part2").exists()


def test_files_in_and_out(finished: Callable[[str], Path], cli: Callable[..., Finished]) -> None:
    run = str(finished("sft"))
    Path("asked.jsonl").write_text('{"prompt": "say one"}\n{"prompt": "say two"}\n')
    Path("asked.txt").write_text("say one\nsay two\n")
    Path("asked.csv").write_text("question\nsay one\nsay two\n")
    written = []
    for name, *more in (("asked.jsonl",), ("asked.txt",), ("asked.csv", "column=question")):
        ended = cli("predict", run, f"file={name}", *more, f"out={name}.answers", "max_new_tokens=3")
        assert ended.status == 0, ended.err
        written.append(lines(Path(f"{name}.answers").read_text()))
    assert [line["prompt"] for line in written[0]] == ["say one", "say two"]
    assert written[0] == written[1] == written[2]
    again = cli("predict", run, "file=asked.txt", "out=asked.txt.answers")
    assert again.status == 1
    assert "out: asked.txt.answers exists already" in again.err


@pytest.mark.parametrize("folder", [NO_PLACE])
def test_out_that_cannot_be_written_is_told_before_the_work(
    folder: str, finished: Callable[[str], Path], cli: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplus_hydra.runs.predict.load_run", None)
    ended = cli("predict", str(finished("sft")), "text=say", f"out={folder}/answers.jsonl")
    assert ended.status == 1
    assert f"out: {folder} can't be written" in ended.err


def test_everything_that_is_not_given_is_told_at_once(cli: Callable[..., Finished]) -> None:
    ended = cli("predict", "batch_size=0")
    assert ended.status == 1
    for told in (
        "run: no run's folder is given",
        "text: neither text nor file is set",
        "batch_size: 0 is out of range",
    ):
        assert told in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "text: neither text nor file is set"),
        (["text=a", "file=b"], "text: both text and file are set"),
        (["text=a", "max_new_tokens=0"], "max_new_tokens: 0 is out of range"),
        (["file=nothing.jsonl"], "file: nothing.jsonl: No such file"),
        (["file=columns.jsonl"], "column: columns.jsonl has no column prompt, messages, text; the columns are other"),
        (["file=columns.jsonl", "column=othr"], "column: columns.jsonl has no column othr"),
        (["file=nulls.jsonl"], "file: nulls.jsonl, line 2: 'prompt' is null, not text"),
        (["file=broken.jsonl"], "broken.jsonl"),
        (["text=''"], "the prompt '' has no tokens"),
        (["text=a", "out=nowhere/out.jsonl"], "out: there is no folder nowhere"),
        (["text=say \udcff"], "text: the text isn't UTF-8"),
        (["txt=a"], "txt: there is no such key (did you mean 'text'?)"),
    ],
)
def test_wrong_input_is_told_and_nothing_is_written(
    arguments: list[str], told: str, finished: Callable[[str], Path], cli: Callable[..., Finished]
) -> None:
    Path("columns.jsonl").write_text('{"other": "a"}\n')
    Path("nulls.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n')
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    before = sorted(Path().iterdir())
    ended = cli("predict", str(finished("sft")), *arguments)
    assert ended.status == 1
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert sorted(Path().iterdir()) == before
