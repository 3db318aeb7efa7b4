"""Training, `preview`, `evaluate` and `predict` read generated rows of every shape alike.

The expected text is written by hand from the dialogue that a row holds, without code of the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from loraplus_hydra.check import check
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.runs import evaluate as evaluation
from loraplus_hydra.runs import predict as prediction
from loraplus_hydra.runs.evaluate import evaluate_on
from loraplus_hydra.runs.finished import FinishedRun, open_run
from loraplus_hydra.runs.job import run as run_job
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.runs.preview import preview
from loraplus_hydra.tasks.examples import load_examples
from tests.support.tiny import write_jsonl
from tests.support.words import WORDS, previewed, word_tokenizer, written_rows

ONLY = "task.args.assistant_only_loss=true"
TEXTS = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=4).map(" ".join)


@dataclass(frozen=True)
class Dialogue:
    """A row's content: rounds of question and answer, and another last answer."""

    system: str
    rounds: tuple[tuple[str, str], ...]
    other: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.rounds:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return turns

    def seen(self, *, marked: bool, other: bool = False) -> str:
        """Return the row as the model sees it; `marked` answers before the last carry loss, too."""
        text = f"<system> {self.system} <end> " if self.system else ""
        for number, (question, answer) in enumerate(self.rounds, start=1):
            last = number == len(self.rounds)
            answered = f"{self.other if other and last else answer} <end>"
            text += f"<user> {question} <end> <assistant> " + (f"[{answered}] " if last or marked else f"{answered} ")
        return text.strip()


def dialogues(*, rounds: int = 2, system: bool = True) -> st.SearchStrategy[Dialogue]:
    made = st.builds(
        Dialogue,
        system=TEXTS | st.just("") if system else st.just(""),
        rounds=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=rounds).map(tuple),
        other=TEXTS,
    )
    return made.filter(lambda one: one.other != one.rounds[-1][1])


def share_gpt(turn: dict[str, Any]) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"from": names[turn["role"]], "value": turn["content"]}


def parts(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def hh(one: Dialogue, answer: str) -> str:
    asked = "".join(f"\n\nHuman: {question}\n\nAssistant: {said}" for question, said in one.rounds[:-1])
    return f"{asked}\n\nHuman: {one.rounds[-1][0]}\n\nAssistant: {answer}"


def sides(one: Dialogue) -> tuple[dict[str, str], dict[str, str]]:
    return one.messages[-1], {"role": "assistant", "content": one.other}


ANY, ONE_ROUND = dialogues(), dialogues(rounds=1, system=False)


@dataclass(frozen=True)
class Form:
    """A shape of rows: a row of a dialogue, and what is read of it."""

    row: Callable[[Dialogue], dict[str, Any]]
    task: str = "task=sft"
    dialogues: st.SearchStrategy[Dialogue] = ANY
    marked: bool = False  # all answers carry loss


FORMS: dict[str, Form] = {
    "texts": Form(lambda d: {"prompt": d.rounds[0][0], "completion": d.rounds[0][1]}, dialogues=ONE_ROUND),
    "Alpaca": Form(
        lambda d: {"system": d.system, "instruction": d.rounds[0][0], "input": "", "output": d.rounds[0][1]},
        dialogues=dialogues(rounds=1),
    ),
    "lists": Form(lambda d: {"prompt": d.messages[:-1], "completion": d.messages[-1:]}),
    "messages": Form(lambda d: {"messages": d.messages}, marked=True),
    "ShareGPT": Form(lambda d: {"conversations": [share_gpt(turn) for turn in d.messages]}, marked=True),
    "parts": Form(lambda d: {"messages": [parts(turn) for turn in d.messages]}, marked=True),
    "JSON text": Form(lambda d: {"messages": json.dumps(d.messages)}, marked=True),
    "preferences": Form(
        lambda d: {"prompt": d.messages[:-1], "chosen": sides(d)[0]["content"], "rejected": sides(d)[1]["content"]},
        "task=dpo",
    ),
    "whole preferences": Form(
        lambda d: {"chosen": d.messages, "rejected": [*d.messages[:-1], sides(d)[1]]}, "task=dpo"
    ),
    "HH-RLHF": Form(
        lambda d: {"chosen": hh(d, d.rounds[-1][1]), "rejected": hh(d, d.other)},
        "task=dpo",
        dialogues=dialogues(system=False),
    ),
    "judged": Form(lambda d: {"messages": d.messages, "label": True}, "experiment=kto"),
}


def expected_of(form: Form, made: list[Dialogue]) -> list[str]:
    if form.task == "task=dpo":
        return [one.seen(marked=False, other=other) for one in made for other in (False, True)]
    return [one.seen(marked=form.marked) for one in made]


@pytest.fixture(scope="module")
def run(words_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of one step, whose config each test changes."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register, run_of

    folder = tmp_path_factory.mktemp("one_reader")
    path = write_jsonl(folder / "rows.jsonl", [{"messages": Dialogue("", (("say", "one"),), "two").messages}] * 2)
    files = ("data=jsonl", f"data.train={path}", f"data.eval={path}", "task.samples=0", "trainer.use_cpu=true")
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        steps = ("trainer.max_steps=1", "trainer.eval_strategy=no", "optimizer.lr=1e-2")
        config = run_of(compose("config", overrides=["model=hub", f"model.path={words_folder}", *files, *steps, ONLY]))
    run_job(config, folder / "run")
    return open_run(str(folder / "run"))


def configured(compose: Callable[..., Any], model: Path, form: Form, path: Path) -> Any:
    files = ("data=jsonl", f"data.train={path}", f"data.eval={path}", "trainer.use_cpu=true")
    only = [ONLY] if form.task == "task=sft" else []
    return compose(form.task, "model=hub", f"model.path={model}", *files, *only)


def asked_by_predict(path: Path, run: FinishedRun, config: Any) -> list[str]:
    """Return the prompts, as tokens, with which `predict` asks the model."""
    tokenizer, prompts = word_tokenizer(), []

    def answer_together(_: Any, __: Any, asked: list[list[int]], *___: Any, **____: Any) -> list[str]:
        prompts.extend(" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in asked)
        return [""] * len(asked)

    opened = FinishedRun(run.folder, config, run.result, run.adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "answer_together", answer_together)
        patch.setattr(prediction, "_batch_size", lambda *_, **__: 4)
        patch.setattr(prediction, "load_run", lambda _: (None, load_tokenizer(config.model)))
        list(prediction.predict(opened, *prediction.read_texts(str(path), None, opened)))
    return prompts


def measured_by_evaluate(path: Path, run: FinishedRun, config: Any) -> list[str]:
    """Return the examples that `evaluate` measures, as the model sees them."""
    measured: list[Any] = []

    class Measured:
        def __init__(self, examples: Any, folder: Path) -> None:
            measured.append(examples.eval)

        def evaluate(self) -> dict[str, float]:
            return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_run", lambda *_, **__: (None, load_tokenizer(config.model)))
        patch.setattr(evaluation, "bundle", lambda _config, _tokenizer, examples, _model: examples)
        patch.setattr(evaluation, "make_trainer", Measured)
        evaluate_on(FinishedRun(run.folder, config.copy(), run.result, run.adapter), {"eval": str(path)})
    return seen(measured[0])


def seen(examples: Any) -> list[str]:
    """Return examples as the model sees them; those of TRL's preferences by the template."""
    if "input_ids" in examples.column_names:
        return written_rows(examples)
    tokenizer, found = word_tokenizer(), []
    for row in examples:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for name in ("chosen", "rejected", "completion"):
            found += [f"{prompt}[{row[name][0]['content']} <end>]"] if name in row else []
    return found


def rows_of(form: Form, made: list[Dialogue], path: Path) -> Path:
    rows = [form.row(one) for one in made]
    if form.task == "experiment=kto":  # it needs good answers and bad ones
        rows.append({**rows[0], "label": False})
    return write_jsonl(path, rows)


FEW = settings(max_examples=2, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=40, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))


def compare(
    form: Form, made: list[Dialogue], compose: Callable[..., Any], model: Path, run: FinishedRun, folder: Path
) -> None:
    path = rows_of(form, made, folder / "rows.jsonl")
    config = configured(compose, model, form, path)
    examples = load_examples(config, load_tokenizer(config.model))
    written = made + made[:1] if form.task == "experiment=kto" else made
    expected = sorted(expected_of(form, written))
    assert sorted(seen(examples.train)) == expected
    assert sorted(measured_by_evaluate(path, run, config)) == expected
    shown = preview(check(config), load_tokenizer(config.model), examples)
    assert set(map(previewed, shown)) <= set(expected)
    assert shown
    assert asked_by_predict(path, run, config) == [one.seen(marked=False).partition(" [")[0] for one in written]


IN_EACH_RUN = ("texts", "Alpaca", "messages", "ShareGPT", "JSON text", "whole preferences", "judged")


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        pytest.param(name, drawn, id=f"{name}-{count}", marks=[] if name in each else pytest.mark.slow)
        for count, drawn, each in (("few", FEW, IN_EACH_RUN), ("many", MANY, ()))
        for name in FORMS
    ],
)
def test_all_commands_read_rows_alike(
    name: str, drawn: settings, compose: Callable[..., Any], words_folder: Path, run: FinishedRun, tmp_path: Path
) -> None:
    form = FORMS[name]

    @drawn
    @given(st.lists(form.dialogues, min_size=1, max_size=3))
    def holds(made: list[Dialogue]) -> None:
        compare(form, made, compose, words_folder, run, tmp_path)

    holds()


SAMPLE = [
    Dialogue("", (("say one", "one"),), "two"),
    Dialogue("", (("the fox",  "is"),), "not"),
]  # fmt: skip


def some(*names: str) -> list[Any]:
    """Return the names of all forms; those that aren't `names` are slow."""
    return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in FORMS]


@pytest.mark.parametrize("name", some("messages", "whole preferences", "judged"))
def test_preview_shows_what_is_trained(
    name: str, compose: Callable[..., Any], words_folder: Path, tmp_path: Path
) -> None:
    form = FORMS[name]
    config = configured(compose, words_folder, form, rows_of(form, SAMPLE, tmp_path / "rows.jsonl"))
    tokenizer = load_tokenizer(config.model)
    shown = preview(check(config), tokenizer, load_examples(config, tokenizer))
    written = SAMPLE + SAMPLE[:1] if form.task == "experiment=kto" else SAMPLE
    assert sorted(previewed(row) for row in shown) == sorted(expected_of(form, written))


@pytest.mark.parametrize("name", some("Alpaca", "messages")[:7])
def test_evaluate_measures_what_is_trained(name: str, run: FinishedRun, tmp_path: Path) -> None:
    """Its loss is that of transformers on tokens and labels written by hand."""
    form = FORMS[name]
    path = rows_of(form, SAMPLE, tmp_path / "rows.jsonl")
    opened = FinishedRun(run.folder, run.config.copy(), run.result, run.adapter)
    metrics = evaluate_on(opened, {"eval": str(path)})
    model, tokenizer = load_run(run)
    total, count = 0.0, 0
    for row in expected_of(form, SAMPLE):
        learnt, inside = [], False
        for token in row.split():
            inside = inside or token.startswith("[")
            learnt.append(inside)
            inside = inside and not token.endswith("]")
        ids = torch.tensor([tokenizer.convert_tokens_to_ids([token.strip("[]") for token in row.split()])])
        labels = torch.where(torch.tensor([learnt]), ids, -100)
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * sum(learnt)
        count += sum(learnt)
    assert math.isclose(metrics["eval_loss"], total / count, rel_tol=1e-5)


def test_rows_that_change_between_check_and_run_are_read_anew(
    compose: Callable[..., Any], words_folder: Path, tmp_path: Path
) -> None:
    form, path = FORMS["messages"], tmp_path / "rows.jsonl"
    config = configured(compose, words_folder, form, rows_of(form, SAMPLE[:1], path))
    check(config)
    rows_of(form, SAMPLE[1:], path)
    examples = load_examples(config, load_tokenizer(config.model))
    assert seen(examples.train) == expected_of(form, SAMPLE[1:])
