"""Rows of a data set with a hub's layout, and of GLUE's original files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset

from loraplus_hydra.data import glue, hub
from loraplus_hydra.data.rows import ORIGIN, columns
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.tasks.examples import load_examples


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a hub's layout: two configs, one with a validation split."""
    folder = tmp_path_factory.mktemp("published")
    for config, splits in {"main": ("train", "validation"), "extra": ("train",)}.items():
        for split in splits:
            (folder / config).mkdir(exist_ok=True)
            rows = {"question": [f"{config} {split} {number}" for number in range(10)], "answer": ["x"] * 10}
            Dataset.from_dict(rows).to_parquet(str(folder / config / f"{split}.parquet"))
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("main", "extra"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(folder)


def test_splits_by_name(published: str) -> None:
    rows = hub.load(published, "main", eval_split="validation")
    assert rows["train"]["question"][0] == "main train 0"
    assert rows["eval"]["question"][9] == "main validation 9"
    assert rows["eval"][ORIGIN][9] == f"{published}/main[validation], row 10"
    assert columns(rows["train"]) == ["question", "answer"]


def test_a_share_of_the_training_split_is_held_out(published: str) -> None:
    rows = hub.load(published, "extra", eval_fraction=0.2, max_samples=5)
    assert [len(rows[split]) for split in ("train", "eval")] == [5, 2]


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_a_file_of_a_folder_that_keeps_its_time_is_read_anew(name: str, tmp_path: Path) -> None:
    texts = {"train.jsonl": '{{"prompt": "{0}"}}\n', "train.csv": "prompt,other\n{0},x\n"}
    fingerprints = set()
    for value in ("old", "new"):
        (tmp_path / name).write_text(texts[name].format(value))
        os.utime(tmp_path / name, (1e9, 1e9))
        rows = hub.load_split(str(tmp_path), None, "train", None, key="data.train_split")
        assert list(rows["prompt"]) == [value]
        fingerprints.add(rows._fingerprint)
    assert len(fingerprints) == 2  # the tokens are cached by it


def test_streamed(published: str) -> None:
    rows = hub.load(published, "main", eval_split="validation", streaming=True, max_samples=4)
    assert len(list(rows["train"])) == 4
    assert len(rows["eval"]) == 4


def test_all_epochs_of_few_streamed_rows_have_the_same_rows(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "validation-0"):
        Dataset.from_dict({"text": [f"{name} {number}" for number in range(8)]}).to_parquet(
            f"{tmp_path}/{name}.parquet"
        )
    rows = hub.load(str(tmp_path), eval_split="validation", streaming=True, max_samples=6)["train"]
    epochs = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        epochs.append([row["text"] for row in rows])
    assert len(set(epochs[0])) == len(epochs[0]) == 6
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"config": None}, r"data\.config: is not set; use one of (main, extra|extra, main)"),
        ({"config": "mian"}, r"data\.config: .* has no 'mian' \(did you mean 'main'\?\)"),
        ({"config": "main", "train_split": "trian"}, r"data\.train_split: .* no split 'trian' \(did you mean 'train'"),
        (
            {"config": "extra", "eval_split": "validation"},
            r"data\.eval_split: .* no split 'validation'; use one of train",
        ),
        ({"config": "main", "streaming": True}, r"data\.eval_split: rows can't be held out from streamed rows"),
    ],
)
def test_unknown_names_are_errors_with_the_known_ones(published: str, arguments: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigErrors, match=expected):
        hub.load(published, **arguments)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "train[:20%]"),
        ("train[:80%]", "train"),
        ("train+validation", "validation"),
    ],
)
def test_rows_in_both_splits_are_an_error(published: str, train: str, held_out: str) -> None:
    with pytest.raises(ConfigErrors, match=r"data\.eval_split: .* has rows of data\.train_split"):
        hub.load(published, "main", train_split=train, eval_split=held_out)


def test_the_same_split_for_both_measures_the_training_rows(published: str) -> None:
    rows = hub.load(published, "main", train_split="train", eval_split="train")
    assert rows["train"][:] == rows["eval"][:]


def test_parts_of_one_split_are_no_error(published: str) -> None:
    rows = hub.load(published, "main", train_split="train[:8]", eval_split="train[8:]")
    assert [len(rows[split]) for split in ("train", "eval")] == [8, 2]


def test_a_data_set_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"data\.name: .*nowhere"):
        hub.load(str(tmp_path / "nowhere"))


def test_a_name_that_is_too_long_is_an_error() -> None:
    with pytest.raises(ConfigErrors, match=r"data\.name: a+ can't be read: .*File name too long"):
        hub.load("a" * 300)


# Task -> training and development files (name: text), the rows of the training file, the labels' names.
TSV: dict[str, tuple[dict[str, str], list[tuple[str, str | None, float]], list[str] | None]] = {
    "cola": (
        {"train.tsv": 'gj04\t1\t\tA sentence.\ngj04\t0\t*\tSentence "a\n', "dev.tsv": "gj04\t1\t\tAnother.\n"},
        [("A sentence.", None, 1), ('Sentence "a', None, 0)],
        ["unacceptable", "acceptable"],
    ),
    "sst2": (
        {"train.tsv": "sentence\tlabel\nbad \t0\ngood \t1\n", "dev.tsv": "sentence\tlabel\nso \t1\n"},
        [("bad ", None, 0), ("good ", None, 1)],
        ["negative", "positive"],
    ),
    "mnli": (
        {
            "train.tsv": "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
            "0\tfiction\tA\tB\tneutral\tneutral\n1\tfiction\tC\tD\tentailment\tentailment\n2\tfiction\tE\tF\t-\t-\n",
            "dev_matched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\tG\tH\tcontradiction\n",
            "dev_mismatched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\tI\tJ\tneutral\n",
        },
        [("A", "B", 1), ("C", "D", 0)],
        ["entailment", "neutral", "contradiction"],
    ),
    "qqp": (
        {
            "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhat?\tWhy?\t0\n4\t5\tbroken\n",
            "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA\tA\t1\n",
        },
        [("What?", "Why?", 0)],
        ["not_duplicate", "duplicate"],
    ),
    "qnli": (
        {
            "train.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tI.\tnot_entailment\n",
            "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tMe.\tentailment\n",
        },
        [("Who?", "I.", 1)],
        ["entailment", "not_entailment"],
    ),
    "rte": (
        {
            "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
            "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n",
        },
        [("A.", "B.", 0)],
        ["entailment", "not_entailment"],
    ),
    "mrpc": (
        {
            "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA.\tB.\n",
            "dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\tA.\tC.\n",
        },
        [("A.", "B.", 1)],
        ["not_equivalent", "equivalent"],
    ),
    "stsb": (
        {
            "train.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA.\tB.\t3.800\n",
            "dev.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA.\tB.\t0\n",
        },
        [("A.", "B.", 3.8)],
        None,
    ),
}


@pytest.fixture(scope="module")
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    for name, (files, _, _) in TSV.items():
        (folder / glue.TASKS[name].folder).mkdir()
        for file, text in files.items():
            (folder / glue.TASKS[name].folder / file).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", TSV)
def test_each_task_is_read_from_its_original_files(glue_folder: Path, name: str) -> None:
    _, expected, names = TSV[name]
    rows = glue.load(name, str(glue_folder))
    train = rows["train"]
    assert [(row["text"], row["text_pair"], row["label"]) for row in train] == expected
    assert getattr(train.features["label"], "names", None) == names
    assert len(rows["eval"]) == 1


def test_mnli_is_evaluated_on_either_half(glue_folder: Path) -> None:
    assert glue.load("mnli", str(glue_folder))["eval"]["text"][0] == "G"
    assert glue.load("mnli", str(glue_folder / "MNLI"), matched=False)["eval"]["text"][0] == "I"


def test_single_sentences_are_classified_without_a_pair(glue_folder: Path, compose, bert_folder: Path) -> None:  # type: ignore[no-untyped-def]
    def made(name: str, *overrides: str) -> list[int]:
        config = compose(
            "task=classification",
            "data=glue",
            f"data.name={name}",
            f"data.path={glue_folder}",
            "model=hub",
            f"model.path={bert_folder}",
            *overrides,
        )
        return load_examples(config, load_tokenizer(config.model)).train[0]["token_type_ids"]

    assert 1 not in made("cola", "task.metric=eval_matthews")
    assert 1 in made("stsb", "task.metric=eval_pearson")


def test_errors_in_files_have_their_line(glue_folder: Path, tmp_path: Path) -> None:
    for name, text, expected in (
        ("train.tsv", "sentence\tmark\nbad\t0\n", "line 1: there is no column 'label'; the columns are sentence, mark"),
        ("train.tsv", "sentence\tlabel\nbad\t7\n", "line 2: the label '7' is not one of 0, 1"),
        ("dev.tsv", "sentence\tlabel\n", "has no rows"),
    ):
        for file in ("train.tsv", "dev.tsv"):
            (tmp_path / file).write_text("sentence\tlabel\nbad\t0\n")
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigErrors, match=expected):
            glue.load("sst2", str(tmp_path))
    with pytest.raises(ConfigErrors, match=r"no task 'sst' .did you mean 'sst2'"):
        glue.load("sst", str(glue_folder))
