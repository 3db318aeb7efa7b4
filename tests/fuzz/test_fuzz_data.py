"""Spoilt files of rows: every outcome is rows that load, or a listed error that names the file; nothing hangs.

The files come from a seeded generator, so an example is named by its number. `LORAPLUS_FUZZ_FROM` and
`LORAPLUS_FUZZ_COUNT` choose others than the usual ones.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraplus_hydra.errors import ConfigErrors, UserError
from tests.fuzz.test_fuzz_config import within

FIRST = int(os.environ.get("LORAPLUS_FUZZ_FROM", "0"))
FEW, MANY = 100, int(os.environ.get("LORAPLUS_FUZZ_COUNT", "2000"))
PART = 500  # the many are examined in parts, which the workers of a test run share
SECONDS = 60  # of processor time for one file

TURNS = [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "the number 1"}]
COLUMNS: dict[str, dict[str, Callable[[int], Any]]] = {
    "sft": {"prompt": lambda i: f"say {i}", "completion": lambda i: f"the number {i}"},
    "messages": {"messages": lambda _: TURNS},
    "text": {"text": lambda i: f"the quick brown fox {i} jumps over the lazy dog"},
    "classification": {"text": lambda i: f"the card {i}", "label": lambda i: ("there", "late")[i % 2]},
    "regression": {"text": lambda i: f"the card {i}", "label": lambda i: i / 8},
    "dpo": {"prompt": lambda i: f"say {i}", "chosen": lambda i: f"{i}", "rejected": lambda i: f"no {i}"},
}
OVERRIDES = {
    "sft": ["task=sft"],
    "messages": ["task=sft"],
    "text": ["task=text", "task.block_size=16"],
    "classification": ["task=classification"],
    "regression": ["task=classification", "task.problem_type=regression", "task.metric=eval_pearson"],
    "dpo": ["task=dpo"],
}
SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet", "text": ".txt"}
# What is put in place of a value.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e308, 2**63, -(2**70), float("nan"), float("inf"), "", " ", "\n", "\x00"),
    *("\ufeff", "x" * 100_000, "\u202e", "😀", "\u2028", "{{ 1 }}", "{% for %}", "<|end|>", "null", "nan", [], {}),
    *([[]], [None], [1], ["a", 1], [{}], {"a": {"b": [1]}}, {"role": "user"}, [{"role": "user", "content": None}]),
    *({"": 1}, [TURNS], TURNS, [{"role": "x", "content": "y"}], [{"from": ["human"], "value": {}}]),
    *([{"role": "assistant", "content": [{}]}], [{"role": "assistant", "content": 3}]),
    *([{"role": ["user"], "content": "a"}], [{"role": "user", "tool_calls": 3}]),
)
NAMES = (
    "",
    " ",
    "prompt",
    "text",
    "label",
    "messages",
    "tools",
    "chat_template_kwargs",
    "__origin__",
    "__continues__",
    "é",
)


@dataclass(frozen=True)
class Spoilt:
    """A file, and what is typed to read it."""

    content: bytes
    name: str
    task: str
    overrides: tuple[str, ...]
    done: tuple[str, ...]


def spoilt(number: int) -> Spoilt:
    """An example's file: rows of a task, spoilt in up to three ways."""
    dice = random.Random(number)
    task = dice.choice(list(COLUMNS))
    format = dice.choice(("text", "jsonl") if task == "text" else ("jsonl", "jsonl", "csv", "parquet"))
    rows = [{name: make(i) for name, make in COLUMNS[task].items()} for i in range(dice.choice((0, 1, 2, 8, 8, 40)))]
    done: list[str] = []
    for _ in range(dice.randint(0, 3)):
        done.append(dice.choice(list(ROWS)))
        rows = ROWS[done[-1]](rows, dice)
    try:
        content = written(rows, format)
    except (ValueError, TypeError, OverflowError, NotImplementedError):  # Arrow has no type for such rows
        content = written([], "jsonl")
    if dice.random() < 0.6:
        done.append(dice.choice(list(BYTES)))
        content = BYTES[done[-1]](content, dice)
    suffix = SUFFIXES[format] if dice.random() < 0.85 else dice.choice((*SUFFIXES.values(), ".tsv", ".gz"))
    overrides = [f"data={format}"]
    if dice.random() < 0.15:
        overrides.append("data.format=null")
    if dice.random() < 0.2:
        overrides.append(dice.choice(FURTHER))
    return Spoilt(content, f"rows{suffix}", task, tuple(overrides), tuple(done))


def written(rows: list[dict[str, Any]], format: str) -> bytes:
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    if format == "text":
        return "\n".join(str(row.get("text")) for row in rows).encode()
    if format == "csv":
        import csv

        text = io.StringIO()
        writer = csv.writer(text)
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer.writerows([names, *([row.get(name) for name in names] for row in rows)])
        return text.getvalue().encode("utf-8", "surrogatepass")
    import pyarrow as pa
    import pyarrow.parquet

    stream = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


Rows = list[dict[str, Any]]


def _one_value(rows: Rows, dice: random.Random) -> Rows:
    for row in dice.sample(rows, min(len(rows), 1)):
        if row:
            row[dice.choice(list(row))] = dice.choice(ODD)
    return rows


def _one_column(rows: Rows, dice: random.Random) -> Rows:
    name, value = dice.choice(list(rows[0]) if rows and rows[0] else ["x"]), dice.choice(ODD)
    return [{**row, name: value} for row in rows]


def _mixed_column(rows: Rows, dice: random.Random) -> Rows:
    name = dice.choice(list(rows[0]) if rows and rows[0] else ["x"])
    return [{**row, name: dice.choice(ODD)} for row in rows]


def _new_column(rows: Rows, dice: random.Random) -> Rows:
    name, value = dice.choice(NAMES), dice.choice(ODD)
    return [{**row, name: value} for row in rows]


def _lost_column(rows: Rows, dice: random.Random) -> Rows:
    name = dice.choice(list(rows[0]) if rows and rows[0] else ["x"])
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def _lost_cell(rows: Rows, dice: random.Random) -> Rows:
    for row in dice.sample(rows, min(len(rows), 1)):
        if row:
            row.pop(dice.choice(list(row)))
    return rows


def _empty_row(rows: Rows, dice: random.Random) -> Rows:
    return [*rows, {}]


ROWS: dict[str, Callable[[Rows, random.Random], Rows]] = {
    "one value": _one_value,
    "one column": _one_column,
    "a mixed column": _mixed_column,
    "a new column": _new_column,
    "a column lost": _lost_column,
    "a cell lost": _lost_cell,
    "an empty row": _empty_row,
}


def _flipped(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(changed), dice.choice((1, 1, 3, 50)))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _inserted(content: bytes, dice: random.Random) -> bytes:
    odd = (
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b'"',
        b"\n\n",
        b"\\ud800",
        b"\xc3",
        b"{",
        b"]",
        b"\x1a",
    )
    place = dice.randint(0, len(content))
    return content[:place] + dice.choice(odd) * dice.choice((1, 1, 100)) + content[place:]


def _recoded(content: bytes, dice: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(dice.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7", "cp1252")), "replace")


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": _flipped,
    "inserted": _inserted,
    "recoded": _recoded,
    "cut off": lambda content, dice: content[: dice.randint(0, len(content))],
    "begun late": lambda content, dice: content[dice.randint(0, len(content)) :],
    "gzipped": lambda content, _: gzip.compress(content),
    "a mark ahead": lambda content, _: b"\xef\xbb\xbf" + content,
    "two marks ahead": lambda content, _: b"\xef\xbb\xbf\xef\xbb\xbf" + content,
    "twice": lambda content, _: content + content,
    "no line ends": lambda content, _: content.replace(b"\n", b" "),
    "other line ends": lambda content, _: content.replace(b"\n", b"\r"),
    "noise": lambda _, dice: dice.randbytes(200),
    "nested deeply": lambda content, _: content + b'{"prompt": ' + b"[" * 100_000 + b"\n",
    "a large number": lambda content, _: content + b'{"prompt": ' + b"9" * 10_000 + b"}\n",
    "first line twice": lambda content, _: content.split(b"\n")[0] + b"\n" + content,
    "nothing": lambda *_: b"",
}
FURTHER = (
    *("data.streaming=true", "data.max_samples=1", "data.eval_fraction=0.999", "data.encoding=utf-16"),
    *("data.encoding=latin-1", "data.encoding=utf-7", "data.encoding=idna", "data.encoding=rot13"),
    *("data.encoding=zlib", "data.encoding=undefined", "+data.delimiter=tab", "+data.delimiter=' '"),
    *("+data.quote=null", "+data.header=false", "+data.unit=line", "+data.unit=paragraph", "data.train={FILE: 2}"),
    *("data.train=[FILE, FILE]", "data.train='FOLDER/*'", "data.train=FOLDER", "data.text_column=label"),
    *("data.prompt_column=completion", "data.label_column=text", "data.text_pair_column=text"),
    *("task.args.max_length=1", "task.args.max_length=null", "task.samples=1000", "task.chat=true"),
    *("task.chat=false", "task.args.assistant_only_loss=true", "task.args.packing=true"),
    "task.problem_type=multi_label_classification",
)


@dataclass(frozen=True)
class Outcome:
    """What is wrong with how a file was taken, or nothing."""

    example: Spoilt
    wrong: str

    def __str__(self) -> str:
        spoilt = self.example
        return (
            f"{spoilt.name}, {spoilt.task}, {spoilt.overrides}, {spoilt.done}: {self.wrong}\n{spoilt.content[:300]!r}"
        )


def outcome(example: Spoilt, folder: Path, model: Path, compose: Callable[..., Any]) -> str:
    """What is wrong with how a file is taken; empty for rows that load and for a listed error that names the file."""
    from loraplus_hydra.check.keys import read_config, unknown_keys
    from loraplus_hydra.check.values import value_problems
    from loraplus_hydra.models.tokenizer import load_tokenizer
    from loraplus_hydra.tasks.examples import load_examples

    path = folder / example.name
    path.write_bytes(example.content)
    further = [text.replace("FILE", str(path)).replace("FOLDER", str(folder)) for text in example.overrides[1:]]
    task = OVERRIDES[example.task]
    train = [f"data.train={path}"] + [f"data.eval={path}"] * (len(example.content) % 2 or "streaming" in str(further))
    try:
        config = compose("model=hub", f"model.path={model}", *task, example.overrides[0], *train, *further)
    except Exception as error:  # an override that this option hasn't: told by the tests of overrides
        return "" if "Hydra" in str(type(error).__mro__) else f"not composed: {error}"
    plain, problems = read_config(config)
    if problems + unknown_keys(plain, config) + value_problems(plain):
        return ""
    try:
        used = time.process_time()
        with within(10 * SECONDS):  # on a loaded machine a read waits
            examples = load_examples(config, load_tokenizer(config.model))
            rows = [*zip(range(3), examples.train, strict=False)]
            if (took := time.process_time() - used) > SECONDS:
                return f"it took {took:.0f} s of processor time"
            return "" if rows and len(examples.eval) else "no examples, and no word of it"
    except ConfigErrors as error:
        about_settings = all(one.key.split(".")[0] in ("task", "model") or one.fix for one in error.problems)
        return "" if example.name in str(error) or about_settings else f"the file isn't named: {error}"
    except UserError as error:
        return "" if example.name in str(error) else f"the file isn't named: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def examine(numbers: range, folder: Path, model: Path, compose: Callable[..., Any]) -> list[str]:
    """The examples that are taken wrongly, in words."""
    found = []
    for number in numbers:
        example = spoilt(number)
        wrong = outcome(example, folder, model, compose)
        if wrong:
            found.append(f"{number}: {Outcome(example, wrong)}"[:1500])
        if os.environ.get("LORAPLUS_FUZZ_LOG"):
            with Path(os.environ["LORAPLUS_FUZZ_LOG"]).open("a") as log:
                log.write(f"{number}\t{found[-1] if wrong else ''!r}\n")
        for path in folder.iterdir():
            path.unlink()
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for one file at a time, which isn't the current one."""
    folder = tmp_path / "rows"
    folder.mkdir()
    return folder


def test_any_file_is_rows_or_a_listed_error(place: Path, llama_folder: Path, compose: Callable[..., Any]) -> None:
    wrong = examine(range(FIRST, FIRST + FEW), place, llama_folder, compose)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST + FEW, FIRST + FEW + MANY, PART))
def test_thousands_of_files_are_rows_or_a_listed_error(
    first: int, place: Path, llama_folder: Path, compose: Callable[..., Any]
) -> None:
    wrong = examine(range(first, first + PART), place, llama_folder, compose)
    assert not wrong, "\n".join(wrong)


def jsonl(**row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


# What the generator has found, told by name: the file, what is typed, what must be said.
FOUND: dict[str, tuple[Spoilt, str]] = {
    "column with a reserved name": (
        Spoilt(jsonl(prompt="a", completion="b", __origin__=1) * 4, "rows.jsonl", "sft", ("data=jsonl",), ()),
        "rows.jsonl, line 1: the column name '__origin__' is reserved for this program",
    ),
    "column with a reserved name in Parquet": (
        Spoilt(
            written([{"prompt": "a", "completion": "b", "__origin__": 1}] * 4, "parquet"),
            *("rows.parquet", "sft", ("data=parquet",), ()),
        ),
        "rows.parquet: the column name '__origin__' is reserved for this program",
    ),
    "number of too many digits": (
        Spoilt(b'{"prompt": ' + b"9" * 10_000 + b"}\n", "rows.jsonl", "sft", ("data=jsonl",), ()),
        "rows.jsonl, line 1: Exceeds the limit",
    ),
    "codec that is none of text": (
        Spoilt(jsonl(prompt="a", completion="b") * 4, "rows.jsonl", "sft", ("data=jsonl", "data.encoding=zlib"), ()),
        "data.encoding: there is no encoding 'zlib'",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_the_generator_has_found_is_told(
    name: str, place: Path, llama_folder: Path, compose: Callable[..., Any]
) -> None:
    from loraplus_hydra.models.tokenizer import load_tokenizer
    from loraplus_hydra.tasks.examples import load_examples

    example, told = FOUND[name]
    (place / example.name).write_bytes(example.content)
    rows = (f"data.train={place / example.name}", f"data.eval={place / example.name}")
    config = compose("model=hub", f"model.path={llama_folder}", *OVERRIDES[example.task], *example.overrides, *rows)
    with pytest.raises(ConfigErrors) as error:
        load_examples(config, load_tokenizer(config.model))
    assert told in str(error.value)
