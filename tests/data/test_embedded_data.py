"""The embedded data set: its pairs, the held-out modules, and the order of rows."""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Value
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from loraplus_hydra.data.embedded import Pair, first_sentence, library_pairs, load, module_pairs
from loraplus_hydra.data.embedded.source import Source, is_held_out, library_modules, read_library
from loraplus_hydra.errors import ConfigErrors, UserError

MODULE = '''\
"""Says what the module is."""

import enum


class Colour(enum.Enum):
    """A colour.  It has a name."""

    RED = 1

    @property
    def name(self):
        """Return the
        name."""
        # a comment stays
        return self._name


def outer(a, *, b: int = 2) -> None:
    """Do something.

    With details.
    """

    def inner():
        "Do the inner thing"

    return inner


def silent():
    return 1
'''


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    return {name: [Pair(**row) for row in rows] for name, rows in load().items()}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Write a standard library of two training modules and one that is held out."""
    train = [name for name in ("alpha", "beta", "gamma", "delta", "epsilon") if not is_held_out(name, 0.5)][:2]
    held_out = next(name for name in (f"module{number}" for number in range(100)) if is_held_out(name, 0.5))
    for name in [*train, held_out]:
        (tmp_path / f"{name}.py").write_text(
            f'def {name}_size(x):\n    """Return the size of {name}."""\n    return x\n'
        )
    return tmp_path


# --- which sentence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x.", "Return x."),
        ("Return x. Then y.", "Return x."),
        ("Return x\nand y.\n\nMore.", "Return x and y."),
        ("Return x\n\nMore.", "Return x"),
        ("  Return   x.\n", "Return x."),
        ("Take numbers, e.g. 1.5, i.e. floats. Then stop.", "Take numbers, e.g. 1.5, i.e. floats."),
        ("Read a.b.c, see os.path. Then stop.", "Read a.b.c, see os.path."),
        ("Is it there? Say so.", "Is it there?"),
        ('Say "stop." Then go.', 'Say "stop."'),
        ("Return a copy of S. Then y.", "Return a copy of S."),
        ("open(file, mode='r') -> file object\n\nOpen a file.", "Open a file."),
        ("f(x, y)\n\nAdd both.", "Add both."),
        ("", None),
        ("Docs.", None),
        (">>> f(1) is not None", None),
        ("f(x)", None),
        ("word " * 50, None),
    ],
)
def test_first_sentence(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


@given(st.text())
def test_a_sentence_is_one_line_of_bounded_length(docstring: str) -> None:
    sentence = first_sentence(docstring, max_chars=30)
    if sentence is not None:
        assert len(sentence) <= 30
        assert sentence == " ".join(sentence.split())
        assert sentence in " ".join(docstring.split())


# --- docstrings are cut out ------------------------------------------------------------------------------------------


def _docstrings(source: str) -> list[str]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, holders)]
    return [docstring for docstring in map(ast.get_docstring, nodes) if docstring is not None]


def _without_bare_strings(source: str) -> str:
    """Return the code without string statements, by an independent method; `pass` fills empty blocks."""

    class Cut(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            super().generic_visit(node)
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list) and block:
                    kept = [statement for statement in block if not _is_string(statement)]
                    setattr(node, name, kept if kept or isinstance(node, ast.Module) else [ast.Pass()])
            return node

    return ast.dump(Cut().visit(ast.parse(source)))


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_docstrings_are_cut_and_the_rest_stays() -> None:
    text = Source(MODULE).without_docstrings()
    assert _docstrings(text) == []
    assert "# a comment stays" in text
    assert text.startswith("import enum\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(): "doc"\n', "def f(): pass\n"),
        ('def f():\n    "doc"\n', "def f():\n    pass\n"),
        ('def f():\n    "doc"\n\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    "doc"; return 1\n', "def f():\n    pass; return 1\n"),
        ('def f():\n    "doc"  # why\n    return 1\n', "def f():\n    pass  # why\n    return 1\n"),
        ('def f():\n    "one"\n    "two"\n', "def f():\n    pass\n"),
        ('def f():\n    """é\x0c\n    ü"""\n    return "é"\n', 'def f():\n    return "é"\n'),
        ('x = "text"\n"bare"\n', 'x = "text"\n'),
        ('if x:\n    "bare"\nelse:\n    y()\n', "if x:\n    pass\nelse:\n    y()\n"),
    ],
)
def test_cutting_leaves_valid_python(source: str, expected: str) -> None:
    assert Source(source).without_docstrings() == expected


def test_cutting_the_library_changes_only_bare_strings() -> None:
    names = {"argparse", "asyncio.tasks", "decimal", "dataclasses", "turtle", "typing", "re", "tkinter", "inspect"}
    checked = set()
    for name, path in library_modules().items():
        if name in names:
            source = path.read_text(encoding="utf-8")
            text = Source(source).without_docstrings()
            assert ast.dump(ast.parse(text)) == _without_bare_strings(source), name
            checked.add(name)
    assert len(checked) >= 5


def test_no_prompt_of_the_library_has_a_docstring(splits: dict[str, list[Pair]]) -> None:
    """Parse the prompts that are complete definitions, and look for docstrings."""
    parsed = 0
    for pair in splits["train"][:500]:
        try:
            tree = ast.parse(pair.prompt)
        except SyntaxError:
            continue  # cut short
        parsed += 1
        assert not any(map(_is_string, ast.walk(tree))), pair.prompt
    assert parsed > 200


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_code_without_its_docstring_and_the_docstrings_first_sentence_are_a_pair() -> None:
    colour, name, outer, inner = module_pairs(Source(MODULE))
    assert colour == Pair(
        "class Colour(enum.Enum):\n    RED = 1\n\n    @property\n    def name(self):\n"
        "        # a comment stays\n        return self._name",
        "A colour.",
    )
    assert name.prompt == (
        "class Colour(enum.Enum):\n    @property\n    def name(self):\n"
        "        # a comment stays\n        return self._name"
    )
    assert name.completion == "Return the name."
    assert outer.completion == "Do something."
    assert inner == Pair("def inner():\n    pass", "Do the inner thing")


def test_without_body_the_signature_is_left() -> None:
    prompts = [pair.prompt for pair in module_pairs(Source(MODULE), body=False)]
    assert prompts == [
        "class Colour(enum.Enum):",
        "class Colour(enum.Enum):\n    @property\n    def name(self):",
        "def outer(a, *, b: int = 2) -> None:",
        "def inner():",
    ]


def test_long_prompts_end_at_a_line() -> None:
    source = Source('def f(x):\n    """Do a thing."""\n' + "    x = x + 1\n" * 100)
    (pair,) = module_pairs(source, max_prompt_chars=100)
    assert len(pair.prompt) <= 100
    assert pair.prompt.endswith("\n    x = x + 1")


def test_the_library_has_some_thousand_pairs(splits: dict[str, list[Pair]]) -> None:
    train, held_out = splits["train"], splits["eval"]
    assert 3000 <= len(train) <= 12000
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15
    for pair in train + held_out:
        assert 0 < len(pair.prompt) <= 400
        assert len(pair.completion) <= 160
        assert "\n" not in pair.completion


def test_a_prompt_comes_once(splits: dict[str, list[Pair]]) -> None:
    prompts = [pair.prompt for pairs in splits.values() for pair in pairs]
    assert len(prompts) == len(set(prompts))


# --- what is held out ------------------------------------------------------------------------------------------------


def test_no_module_is_in_both_splits(splits: dict[str, list[Pair]]) -> None:
    train, held_out = set(splits["train"]), set(splits["eval"])
    for name, source in read_library():
        pairs = set(module_pairs(source))
        assert not pairs & (train if is_held_out(name) else held_out), name


def test_held_out_modules_are_the_same_under_every_version() -> None:
    """Compare with a fixed list: the shipped weights were trained on all other modules."""
    names = [
        "argparse",
        "asyncio.queues",
        "calendar",
        "copy",
        "difflib",
        "imaplib",
        "json",
        "re",
        "selectors",
        "turtle",
    ]
    assert [name for name in names if is_held_out(name)] == ["asyncio.queues", "calendar", "imaplib", "re", "selectors"]


def test_a_renamed_module_stays_in_its_split() -> None:
    for name in ("datetime", "decimal", "io"):
        assert is_held_out(f"_py{name}") == is_held_out(name)


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_includes_a_smaller_one(name: str, one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    assert is_held_out(name, larger) or not is_held_out(name, smaller)


# --- order -----------------------------------------------------------------------------------------------------------


def test_order_is_the_same_in_every_process(splits: dict[str, list[Pair]]) -> None:
    """Compare with a process that has another `hash` and no packages."""
    code = (
        "import hashlib; from loraplus_hydra.data.embedded import library_pairs;"
        "print(hashlib.sha256(repr(library_pairs()).encode()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    # -S: no site-packages, as on a Python with nothing installed.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(repr(splits).encode()).hexdigest()


def test_order_is_not_the_file_systems(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = library_pairs(folder=library, eval_fraction=0.5)
    walk = os.walk

    def backwards(top: Path) -> object:
        for place, folders, files in walk(top):
            yield place, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert library_pairs(folder=library, eval_fraction=0.5) == expected


# --- what is read ----------------------------------------------------------------------------------------------------


def test_tests_tables_packages_and_local_files_are_left_out(library: Path) -> None:
    before = set(library_modules(library))
    for file in (
        "test/support.py",
        "json/tests/test_json.py",
        "encodings/cp1250.py",
        "site-packages/numpy.py",
        "sitecustomize.py",
        "_sysconfigdata__linux_x86_64.py",
        "not-a-module.py",
        "notes.txt",
    ):
        (library / file).parent.mkdir(parents=True, exist_ok=True)
        (library / file).write_text("x = 1\n")
    (library / "json/__init__.py").write_text("x = 1\n")
    (library / "json/decoder.py").write_text("x = 1\n")
    assert set(library_modules(library)) - before == {"json", "json.decoder"}


@pytest.mark.parametrize("content", [b"def broken(:\n", b"x = '\xff'\n", b"x = 1\0\n", b"# coding: no-such\nx = 1\n"])
def test_unreadable_files_are_skipped(library: Path, content: bytes) -> None:
    before = library_pairs(folder=library, eval_fraction=0.5)
    (library / "zeta.py").write_bytes(content)
    assert library_pairs(folder=library, eval_fraction=0.5) == before


def test_other_encodings_and_line_ends_are_read(library: Path) -> None:
    name = next(name for name in (f"m{number}" for number in range(100)) if not is_held_out(name, 0.5))
    text = '# coding: latin-1\r\ndef f():\r\n    """Größe von x."""\r\n    return "ß"\r\n'
    (library / f"{name}.py").write_bytes(text.encode("latin-1"))
    pairs = library_pairs(folder=library, eval_fraction=0.5)["train"]
    assert Pair('def f():\n    return "ß"', "Größe von x.") in pairs


def test_a_python_without_its_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "python311.zip"))
    with pytest.raises(UserError, match=r"no standard library source in .*python311\.zip.*data=jsonl"):
        load(max_prompt_chars=333)  # these rows are in no cache


def test_a_split_without_rows_is_an_error(library: Path) -> None:
    with pytest.raises(UserError, match=r"data\.eval_fraction: 1e-09 leaves no eval rows"):
        library_pairs(folder=library, eval_fraction=1e-9)
    assert gc.isenabled()


# --- load ------------------------------------------------------------------------------------------------------------


def test_load_returns_a_dataset_dict(splits: dict[str, list[Pair]]) -> None:
    rows = load(max_samples=5)
    assert set(rows) == {"train", "eval"}
    for split, part in rows.items():
        assert part.features == {"prompt": Value("string"), "completion": Value("string")}
        assert [Pair(**row) for row in part] == splits[split][:5]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"eval_fraction": 0.0}, "data.eval_fraction"),
        ({"eval_fraction": 1.0}, "data.eval_fraction"),
        ({"eval_fraction": float("nan")}, "data.eval_fraction"),
        ({"max_samples": 0}, "data.max_samples"),
        ({"max_prompt_chars": 10}, "data.max_prompt_chars"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigErrors) as error:
        load(**arguments)
    assert [problem.key for problem in error.value.problems] == [key]


def test_all_wrong_arguments_are_listed_at_once() -> None:
    with pytest.raises(ConfigErrors) as error:
        load(eval_fraction=2.0, max_samples=-1, max_prompt_chars=0)
    assert len(error.value.problems) == 3


def test_the_config_has_the_arguments_of_load() -> None:
    config = OmegaConf.load(Path(__file__).resolve().parents[2] / "conf/data/embedded.yaml")
    arguments = {name: value for name, value in config.items() if name != "_target_" and not name.endswith("_column")}
    defaults = {name: parameter.default for name, parameter in inspect.signature(load).parameters.items()}
    assert arguments == defaults
