"""The embedded data set: the documentation of the very Python that runs this, read from its standard library's source.

A pair is the source of a function, method or class without its docstrings, and the first sentence of its docstring.
Whole modules are held out for evaluation. Nothing here but `load` needs a package from outside the standard library.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Union

from loraplus_hydra.data.embedded.source import EVAL_FRACTION, Source, blocks, is_held_out, read_library, stable_hash
from loraplus_hydra.errors import ConfigErrors, Problem, UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

Definition = Union[ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef]  # noqa: UP007

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.?g|i\.?e|cf|vs|resp|approx|incl|esp|et al|fig)\.$", re.IGNORECASE)
_SIGNATURE = re.compile(r"[\w.\[\]]+\(.*\)\s*(?:->.*)?")  # some docstrings begin by saying how it is called


class Pair(NamedTuple):
    """One example: source code without docstrings -> what its docstring says first."""

    prompt: str
    completion: str


def load(
    *,
    body: bool = True,
    max_prompt_chars: int = 400,
    eval_fraction: float = EVAL_FRACTION,
    max_samples: int | None = None,
) -> DatasetDict:
    """The pairs as a DatasetDict of "train" and "eval", whose columns "prompt" and "completion" are strings.

    `body=False` leaves only the signature in the prompt. A prompt longer than `max_prompt_chars` is cut at the end of a
    line. `eval_fraction` (between 0 and 1) of the modules are held out whole. `max_samples` rows of each split at most,
    a fair sample of it: rows come in an order that says nothing. The result depends on the Python version alone.
    Raises ConfigErrors for arguments out of range, UserError where the standard library's source isn't there.
    """
    problems = list(_argument_problems(max_prompt_chars, eval_fraction, max_samples))
    if problems:
        raise ConfigErrors(problems)
    splits = _kept_pairs(body, max_prompt_chars, eval_fraction)

    from datasets import Dataset, DatasetDict

    columns = {
        name: {
            "prompt": [pair.prompt for pair in pairs[:max_samples]],
            "completion": [pair.completion for pair in pairs[:max_samples]],
        }
        for name, pairs in splits
    }
    return DatasetDict({name: Dataset.from_dict(rows) for name, rows in columns.items()})


@lru_cache(maxsize=1)
def _kept_pairs(body: bool, max_prompt_chars: int, eval_fraction: float) -> tuple[tuple[str, tuple[Pair, ...]], ...]:
    """The pairs by split, read once for a process: reading takes seconds, and nobody can write to tuples."""
    splits = library_pairs(body=body, max_prompt_chars=max_prompt_chars, eval_fraction=eval_fraction)
    return tuple((name, tuple(pairs)) for name, pairs in splits.items())


def _argument_problems(max_prompt_chars: int, eval_fraction: float, max_samples: int | None) -> Iterator[Problem]:
    if max_prompt_chars < 40:
        yield Problem("data.max_prompt_chars", f"{max_prompt_chars} leaves no room for a signature", "give 40 or more")
    if not 0 < eval_fraction < 1:
        yield Problem("data.eval_fraction", f"{eval_fraction} isn't between 0 and 1", "0.1 holds out a tenth")
    if max_samples is not None and max_samples < 1:
        yield Problem("data.max_samples", f"{max_samples} rows are none", "give 1 or more, or null for all")


def library_pairs(
    *, body: bool = True, max_prompt_chars: int = 400, eval_fraction: float = EVAL_FRACTION, folder: Path | None = None
) -> dict[str, list[Pair]]:
    """{"train": pairs, "eval": pairs} of the standard library in `folder` (default: this Python's), each prompt once.

    Raises UserError if there is no source, or if either split would be empty.
    """
    splits: dict[str, list[Pair]] = {"train": [], "eval": []}
    seen = set()
    for module, source in read_library(folder):
        split = splits["eval" if is_held_out(module, eval_fraction) else "train"]
        for pair in module_pairs(source, body=body, max_prompt_chars=max_prompt_chars):
            if pair.prompt not in seen:
                seen.add(pair.prompt)
                split.append(pair)
    for name, pairs in splits.items():
        if not pairs:
            raise UserError(
                f"data.eval_fraction: {eval_fraction} leaves no {name} rows in this Python's standard library; "
                f"{EVAL_FRACTION} is the usual share, or take your own text: data=jsonl data.train=FILE"
            )
        pairs.sort(key=lambda pair: stable_hash(pair.prompt))
    return splits


def module_pairs(source: Source, *, body: bool = True, max_prompt_chars: int = 400) -> Iterator[Pair]:
    """The pairs of one module: its functions, methods and classes whose docstring has a usable first sentence."""
    for node, owner in definitions(source.tree):
        sentence = first_sentence(ast.get_docstring(node) or "")
        if sentence:
            yield Pair(_shortened(source_of(source, node, owner, body=body), max_prompt_chars), sentence)


def first_sentence(docstring: str, max_chars: int = 160) -> str | None:
    """The first sentence of a docstring on one line; None if it has but one word or over `max_chars` (1% have)."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        text = " ".join(paragraph.split())
        if _SIGNATURE.fullmatch(text):
            continue
        for end in _SENTENCE_END.finditer(text):
            if not _ABBREVIATION.search(text[: end.end()]):
                text = text[: end.end()]
                break
        words = sum(any(map(str.isalpha, word)) for word in text.split())
        usable = words > 1 and ">>>" not in text and len(text) <= max_chars
        return text if usable else None
    return None


def definitions(node: ast.AST, owner: ast.ClassDef | None = None) -> Iterator[tuple[Definition, ast.ClassDef | None]]:
    """Every function and class inside `node`, with the class that directly holds it."""
    for block in blocks(node):
        for statement in block:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield statement, owner
                yield from definitions(statement, statement if isinstance(statement, ast.ClassDef) else None)
            else:
                yield from definitions(statement, owner)


def source_of(source: Source, node: Definition, owner: ast.ClassDef | None, *, body: bool = True) -> str:
    """A definition's text without docstrings, below the first line of the class that holds it, or its signature."""
    text = source.without_docstrings(source.line_of(node), source.end(node) if body else source.begin(node.body[0]))
    text = text.rstrip()
    if owner is None:
        return _indented(text, "")
    bases = ", ".join(ast.unparse(base) for base in owner.bases)
    head = f"class {owner.name}({bases}):" if bases else f"class {owner.name}:"
    return head + "\n" + _indented(text, "    ")


def _shortened(text: str, max_chars: int) -> str:
    """`text` up to the last line's end within `max_chars`, or cut inside a line where that would lose half of it."""
    if len(text) <= max_chars:
        return text
    whole_lines = text[: max_chars + 1].rpartition("\n")[0]
    return whole_lines if len(whole_lines) > max_chars // 2 else text[:max_chars]


def _indented(text: str, margin: str) -> str:
    """`text` with `margin` in place of its first line's indentation, in every line that has it."""
    old = text[: len(text) - len(text.lstrip())]
    return "\n".join(margin + line.removeprefix(old) if line.strip() else "" for line in text.split("\n"))
