"""Rows from files: read, held out, drawn, mixed, streamed, and cached between runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from loraplus_hydra.data import mixing
from loraplus_hydra.data.files import load
from loraplus_hydra.data.rows import CONTINUES, ORIGIN, load_rows
from loraplus_hydra.errors import ConfigErrors
from tests.support import processes
from tests.support.tiny import write_jsonl


def numbered(path: Path, count: int, name: str = "a") -> Path:
    return write_jsonl(path, ({"prompt": f"{name}{number}", "completion": "x"} for number in range(count)))


def test_rows_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a"}\n\n{"prompt": "b"}\n', encoding="utf-8")
    rows = load(str(path), str(path))["train"]
    assert list(rows["prompt"]) == ["a", "b"]
    assert list(rows[ORIGIN]) == [f"{path}, line 1", f"{path}, line 3"]


def test_json_values_are_unchanged(tmp_path: Path) -> None:
    values = [[{"role": "user", "content": "5", "extra": None}], "5", 5, {"a": {"b": [1, 2.5]}}, None, "text", True]
    path = write_jsonl(tmp_path / "a.jsonl", ({"mixed": value, "number": 1 if value else 2.5} for value in values))
    rows = load(str(path), str(path))["train"]
    assert list(rows["mixed"]) == values
    assert list(rows["number"])[:5] == [1.0, 1.0, 1.0, 1.0, 2.5]


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_inside_json_are_unchanged(tmp_path: Path, streaming: bool, files: int) -> None:
    # The shortest texts of doubles with 17 digits, of a small number, and whole numbers beyond 64 bits.
    values = [
        {"x": 0.12345678901234568},
        [1.23e-20, 1e-12],
        {"x": 123456789012345678901234567890},
        "[1e-30]",
        "\r\t\r5",
    ]
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", ({"v": value} for value in values)) for name in range(files)]
    held_out = write_jsonl(tmp_path / "e.jsonl", [{"v": 1}])
    rows = load([*map(str, paths)], str(held_out), streaming=streaming)["train"]
    assert sorted((row["v"] for row in rows), key=str) == sorted(values * files, key=str)


def test_csv_cells_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines, quoted",1\nNA,null\n007,\n')
    rows = load(str(path), str(path))["train"]
    assert list(rows["text"]) == ["two\nlines, quoted", "NA", "007"]
    assert list(rows["label"]) == ["1", "null", ""]
    assert [origin.rpartition(" ")[2] for origin in rows[ORIGIN]] == ["2", "4", "5"]


def test_csv_without_a_header_with_tabs_and_single_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('5"\tx\n6"\ty\n')
    rows = load(str(path), str(path), header=False, quote=None)["train"]
    assert list(rows["0"]) == ['5"', '6"']
    assert list(rows["1"]) == ["x", "y"]


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    Dataset.from_dict({"text": ["a", "b", "c"]}).to_parquet(path)
    rows = load(path, eval_fraction=0.4)
    assert sorted([*rows["train"]["text"], *rows["eval"]["text"]]) == ["a", "b", "c"]
    for row in rows["train"]:
        assert row[ORIGIN] == f"{path}, row {'abc'.index(row['text']) + 1}"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("paragraph", ["one\ntwo", "three"]), ("line", ["one", "two", "three"]), ("file", ["one\ntwo\n\n\nthree"])],
)
def test_text_is_read_in_units(tmp_path: Path, unit: str, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree")
    assert list(load(str(path), str(path), unit=unit)["train"]["text"]) == expected


def test_a_long_text_file_loses_nothing(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n{' ' * (number % 3)}\n" for number in range(2000))
    (tmp_path / "a.txt").write_text(text)
    rows = load(str(tmp_path / "a.txt"), eval_fraction=0.1)
    assert "".join([*rows["train"]["text"], *rows["eval"]["text"]]) == text
    assert list(rows["eval"][CONTINUES])[-1] is False
    assert all(rows["train"][CONTINUES])


def test_other_encodings(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16"):
        path = tmp_path / f"{encoding}.jsonl"
        path.write_text('{"prompt": "caf\u00e9"}\n', encoding=encoding)
        assert list(load(str(path), str(path), encoding=encoding)["train"]["prompt"]) == ["caf\u00e9"]


def test_a_share_is_held_out_by_the_seed(tmp_path: Path) -> None:
    path = str(numbered(tmp_path / "a.jsonl", 40))
    first, again, other = (load(path, eval_fraction=0.25, seed=seed) for seed in (0, 0, 1))
    assert len(first["eval"]) == 10
    assert not set(first["train"]["prompt"]) & set(first["eval"]["prompt"])
    assert len({*first["train"]["prompt"], *first["eval"]["prompt"]}) == 40
    assert list(first["eval"]["prompt"]) == list(again["eval"]["prompt"]) != list(other["eval"]["prompt"])


def test_a_parquet_file_that_keeps_its_time_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for value in ("old", "new"):
        Dataset.from_dict({"prompt": [value]}).to_parquet(path)
        os.utime(path, (1e9, 1e9))
        assert list(load(str(path), str(path))["train"]["prompt"]) == [value]


def test_few_rows_are_drawn_from_all(tmp_path: Path) -> None:
    path = str(numbered(tmp_path / "a.jsonl", 100))
    rows = load(path, path, max_samples=10)
    assert [len(rows[split]) for split in ("train", "eval")] == [10, 10]
    assert list(rows["train"]["prompt"]) != [f"a{number}" for number in range(10)]


def documents(folder: Path, **counts: int) -> list[str]:
    """Write a document of so many pieces for each name, and return their paths."""
    for name, count in counts.items():
        (folder / f"{name}.txt").write_text("".join(f"{name * 1100}\n" for _ in range(count)))
    return [str(folder / f"{name}.txt") for name in counts]


def pieces(rows: Dataset) -> list[str]:
    return [text[0] for text in rows["text"]]


def test_few_rows_of_documents_keep_the_weights(tmp_path: Path) -> None:
    first, second, held_out = documents(tmp_path, a=20, b=20, c=1)
    for weights, count, expected in (((0.75, 0.25), 8, "aaaaaabb"), ((0.5, 0.5), 6, "aaabbb"), ((1, 3), 4, "abbb")):
        rows = load(dict(zip((first, second), weights, strict=True)), held_out, max_samples=count)
        assert "".join(pieces(rows["train"])) == expected
    halves = load({first: 0.5, second: 0.5}, eval_fraction=0.5, max_samples=4)
    assert [pieces(halves[split]) for split in ("train", "eval")] == [["a", "a", "b", "b"]] * 2


def test_few_rows_of_documents_come_from_all_files(tmp_path: Path) -> None:
    *paths, held_out = documents(tmp_path, a=20, b=10, c=10, e=1)
    assert "".join(pieces(load(paths, held_out, max_samples=8)["train"])) == "aaaabbcc"
    assert len(load(paths, held_out, max_samples=100)["train"]) == 40
    lines = numbered(tmp_path / "d.jsonl", 20, "d")
    lines.write_text(lines.read_text().replace("prompt", "text"))
    mixed = load([paths[0], str(lines)], held_out, max_samples=4)["train"]
    assert "".join(pieces(mixed)) == "aadd"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(1, 2000))
def test_portions_have_the_ratio_of_the_sizes_and_the_wanted_sum(sizes: list[int], count: int) -> None:
    found, total = mixing.portions(sizes, count), sum(sizes)
    assert sum(found) == min(count, total)
    exact = [size * min(count, total) / total for size in sizes]
    assert all(abs(number - each) <= 1 for number, each in zip(found, exact, strict=True))
    assert all(0 <= number <= size for number, size in zip(found, sizes, strict=True))


def test_lists_and_patterns_take_every_row(tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl", 3, "a")
    numbered(tmp_path / "b.jsonl", 2, "b")
    held_out = str(numbered(tmp_path / "c.json", 1))
    everything = ["a0", "a1", "a2", "b0", "b1"]
    for train in (f"{tmp_path}/*.jsonl", [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]):
        assert list(load(train, held_out)["train"]["prompt"]) == everything


def test_files_are_mixed_by_weight_and_no_row_comes_twice(tmp_path: Path) -> None:
    big, small = numbered(tmp_path / "a.jsonl", 1000, "a"), numbered(tmp_path / "b.jsonl", 30, "b")
    held_out = str(numbered(tmp_path / "c.jsonl", 1))
    prompts = list(load({str(big): 0.7, str(small): 0.3}, held_out)["train"]["prompt"])
    assert len(set(prompts)) == len(prompts) == 100
    assert sum(prompt.startswith("b") for prompt in prompts) == 30


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=5),
)
def test_shares_have_the_ratio_of_the_weights_and_use_one_part_in_full(parts: list[tuple[int, float]]) -> None:
    sizes, weights = zip(*parts, strict=True)
    counts = mixing.shares(sizes, weights)
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    total = min(size / weight for size, weight in parts)
    assert all(abs(count - total * weight) <= 1 for count, weight in zip(counts, weights, strict=True))


def test_columns_that_one_file_lacks_are_null(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "note": "c"}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    held_out = str(numbered(tmp_path / "c.jsonl", 1))
    rows = load([f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"], held_out)["train"]
    assert list(rows["note"]) == ["c", None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files t1, t2 and te, and two links to te: a symbolic one and a hard one."""
    for name in ("t1", "t2", "te"):
        numbered(tmp_path / f"{name}.jsonl", 4, name)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "te.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "te.jsonl")
    return tmp_path


@pytest.mark.parametrize("held_out", ["te.jsonl", "link.jsonl", "hard.jsonl", "./te.jsonl", "t[e-z].jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_in_both_splits_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, held_out: str, streaming: bool
) -> None:
    monkeypatch.chdir(folder)
    for train in ("t*.jsonl", ["t1.jsonl", "te.jsonl"], {"t1.jsonl": 1, f"{folder}/te.jsonl": 2}):
        with pytest.raises(ConfigErrors, match=r"data\.eval: .*\.jsonl is also in data\.train; leave it out of one"):
            load(train, held_out, streaming=streaming)  # type: ignore[arg-type]
    assert len(load("t[12].jsonl", held_out)["train"]) == 8


@pytest.mark.parametrize("again", ["te.jsonl", "link.jsonl", "hard.jsonl", "./te.jsonl", "t*.jsonl"])
def test_a_file_named_twice_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    monkeypatch.chdir(folder)
    expected = r"data\.train: .*\.jsonl is named twice; name each file once"
    with pytest.raises(ConfigErrors, match=expected):
        load(["te.jsonl", again], "t1.jsonl")
    with pytest.raises(ConfigErrors, match=expected.replace("train", "eval")):
        load("t2.jsonl", ["te.jsonl", again])
    if again not in ("te.jsonl", "t*.jsonl"):  # a key of a mapping is there once, and a weight is for one file
        with pytest.raises(ConfigErrors, match=expected):
            load({"te.jsonl": 1, again: 2}, "t1.jsonl")


def test_both_splits_may_be_the_same_files_on_purpose(folder: Path) -> None:
    rows = load(f"{folder}/t*.jsonl", [f"{folder}/te.jsonl", f"{folder}/t[12].jsonl"])
    assert sorted(rows["train"]["prompt"]) == sorted(rows["eval"]["prompt"])


def test_streamed_rows_are_the_files_rows(tmp_path: Path) -> None:
    path = str(numbered(tmp_path / "a.jsonl", 50))
    rows = load(path, path, streaming=True)
    assert sorted(row["prompt"] for row in rows["train"]) == sorted(f"a{number}" for number in range(50))
    assert len(list(load(path, path, streaming=True, max_samples=7)["train"])) == 7
    other, held_out = str(numbered(tmp_path / "b.jsonl", 50, "b")), str(numbered(tmp_path / "c.jsonl", 1))
    mixed = [row["prompt"][0] for row in load({path: 0.9, other: 0.1}, held_out, streaming=True)["train"]]
    assert 0.75 < mixed.count("a") / len(mixed) < 1


@pytest.mark.parametrize("files", ["one", "two", "weighted"])
def test_all_epochs_of_few_streamed_rows_have_the_same_rows(tmp_path: Path, files: str) -> None:
    first, second = (str(numbered(tmp_path / f"{name}.jsonl", 30, name)) for name in "ab")
    held_out = str(numbered(tmp_path / "c.jsonl", 1))
    train: Any = {"one": first, "two": [first, second], "weighted": {first: 0.5, second: 0.5}}[files]
    rows = load(train, held_out, streaming=True, max_samples=12)["train"]
    epochs = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        epochs.append([row["prompt"] for row in rows])
    assert {len(epoch) for epoch in epochs} == {len(set(epochs[0]))} == {12}
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert {prompt[0] for prompt in epochs[0]} == ({"a"} if files == "one" else {"a", "b"})


def test_streamed_rows_need_rows_to_evaluate_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"data\.eval: rows can't be held out from streamed rows"):
        load(str(numbered(tmp_path / "a.jsonl", 3)), streaming=True)


def test_any_callable_that_returns_a_dataset_dict_is_called(compose: Callable[..., Any]) -> None:
    data = OmegaConf.create({"_target_": "tests.data.test_data_files.own_rows", "count": 3, "prompt_column": "q"})
    assert list(load_rows(data)["train"]["q"]) == ["0", "1", "2"]


def own_rows(count: int, kind: str = "good") -> Any:
    rows = Dataset.from_dict({"q": [str(number) for number in range(count)]})
    if kind == "no dictionary":
        return rows
    if kind == "no eval":
        return DatasetDict(train=rows, test=rows)
    return DatasetDict(train=rows, eval=rows if kind == "good" else rows.to_iterable_dataset())


@pytest.mark.parametrize(
    ("count", "kind", "expected"),
    [
        (3, "no dictionary", "returned a Dataset, not a DatasetDict with 'train' and 'eval'"),
        (3, "no eval", r"returned splits \['test', 'train'\]"),
        (3, "streamed eval", "the rows for evaluation are streamed"),
        (0, "good", "there are no rows in 'train'"),
    ],
)
def test_a_callables_result_is_checked(count: int, kind: str, expected: str) -> None:
    data = OmegaConf.create({"_target_": "tests.data.test_data_files.own_rows", "count": count, "kind": kind})
    with pytest.raises(ConfigErrors, match=expected):
        load_rows(data)


def print_what_is_made(cache: str, file: str) -> None:
    """Print which steps the rows of a config need, the first row's tokens, and how many rows there are."""
    import datasets

    from loraplus_hydra.data import readers
    from loraplus_hydra.models.tokenizer import load_tokenizer
    from loraplus_hydra.tasks import tokens
    from loraplus_hydra.tasks.examples import load_examples

    datasets.config.HF_DATASETS_CACHE = cache
    made = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **k: made.append(function.__name__) or function(*a, **k)

    for module, name in ((readers, "_encoded_rows"), (tokens, "encode_texts"), (tokens, "encode_conversation")):
        setattr(module, name, noted(getattr(module, name)))
    config = OmegaConf.load(file)
    tokenizer = load_tokenizer(config.model)
    tokenizer(["one", "another one"], padding=True, truncation=True, max_length=4)  # leaves its mark on the tokenizer
    examples = load_examples(config, tokenizer)
    print(sorted(set(made)), examples.train["input_ids"][0], len(examples.train))


def test_rows_and_tokens_are_cached_by_content_between_processes(
    compose: Callable[..., Any], llama_folder: Path, tmp_path: Path
) -> None:
    path = numbered(tmp_path / "a.jsonl", 20)
    config = compose("model=hub", f"model.path={llama_folder}", "data=jsonl", f"data.train={path}")
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)

    def run() -> str:
        cache = str(tmp_path / "cache")
        ended = processes.run(print_what_is_made, cache, str(tmp_path / "config.yaml"), folder=tmp_path)
        assert ended.status == 0, ended.out
        return ended.out.strip().splitlines()[-1]

    first = run()
    assert first.startswith("['_encoded_rows', 'encode_conversation', 'encode_texts']")
    path.touch()  # another time stamp, the same content
    assert run() == first.replace("['_encoded_rows', 'encode_conversation', 'encode_texts']", "[]")
    numbered(path, 20, "b")
    changed = run()
    assert changed.startswith("['_encoded_rows', 'encode_conversation', 'encode_texts']")
    assert changed != first


def test_a_changed_program_reads_and_tokenises_rows_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraplus_hydra.data import cache

    def digest_of(code: str) -> str:
        (tmp_path / "tasks" / "sft.py").write_text(code)
        cache._code_digest.cache_clear()
        return cache.digest("rows")

    (tmp_path / "tasks").mkdir()
    monkeypatch.setattr(cache, "_PACKAGE", tmp_path)
    assert digest_of("one = 1") == digest_of("one = 1") != digest_of("one = 2")
    cache._code_digest.cache_clear()
