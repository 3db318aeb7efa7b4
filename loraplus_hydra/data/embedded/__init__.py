"""The rows of the built-in example: source and docstrings of Python's standard library.

A pair is the source of a function, method or class without docstrings, and the first sentence of its docstring. Whole
modules are held out for evaluation. All functions except `load` need only the standard library.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraplus_hydra.data.embedded.source import (
    EVAL_FRACTION,
    Source,
    blocks,
    is_held_out,
    no_collections,
    read_library,
    stable_hash,
)
from loraplus_hydra.errors import Problem, UserError, refuse

if TYPE_CHECKING:
    from datasets import DatasetDict

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.?g|i\.?e|cf|vs|resp|approx|incl|esp|et al|fig)\.$", re.IGNORECASE)
_SIGNATURE = re.compile(r"[\w.\[\]]+\(.*\)\s*(?:->.*)?")  # some docstrings begin with the call


class Pair(NamedTuple):
    """One example: source code without docstrings, and its docstring's first sentence."""

    prompt: str
    completion: str


def load(
    *,
    body: bool = True,
    max_prompt_chars: int = 400,
    eval_fraction: float = EVAL_FRACTION,
    max_samples: int | None = None,
) -> DatasetDict:
    """Load the pairs as splits "train" and "eval", with the columns "prompt" and "completion".

    With `body=False`, the prompt has only the signature. A prompt longer than `max_prompt_chars` is cut at the end of a
    line. The share `eval_fraction` of the modules is held out. At most the first `max_samples` rows of each split are
    used; they are a random sample, because the rows are in random order. The result depends only on the Python version.

    Raises ConfigErrors for arguments out of range, and UserError if there is no source of the standard library.
    """
    refuse(_argument_problems(max_prompt_chars, eval_fraction, max_samples))
    from datasets import Dataset, DatasetDict  # imported here, because the other functions need no packages

    splits = _pairs_once(body, max_prompt_chars, eval_fraction)
    rows = {name: [pair._asdict() for pair in pairs[:max_samples]] for name, pairs in splits}
    return DatasetDict({name: Dataset.from_list(split) for name, split in rows.items()})


# Reading takes seconds, so a process reads once. The pairs are tuples, which can't be changed.
@lru_cache(maxsize=1)
def _pairs_once(body: bool, max_prompt_chars: int, eval_fraction: float) -> tuple[tuple[str, tuple[Pair, ...]], ...]:
    splits = library_pairs(body=body, max_prompt_chars=max_prompt_chars, eval_fraction=eval_fraction)
    return tuple((name, tuple(pairs)) for name, pairs in splits.items())


def _argument_problems(max_prompt_chars: int, eval_fraction: float, max_samples: int | None) -> Iterator[Problem]:
    if max_prompt_chars < 40:
        yield Problem("data.max_prompt_chars", f"{max_prompt_chars} leaves no room for a signature", "set 40 or more")
    if not 0 < eval_fraction < 1:
        yield Problem("data.eval_fraction", f"{eval_fraction} is not between 0 and 1", "0.1 holds out a tenth")
    if max_samples is not None and max_samples < 1:
        yield Problem("data.max_samples", f"{max_samples} is out of range", "set 1 or more, or null for all")


@no_collections()
def library_pairs(
    *, body: bool = True, max_prompt_chars: int = 400, eval_fraction: float = EVAL_FRACTION, folder: Path | None = None
) -> dict[str, list[Pair]]:
    """Return {"train": pairs, "eval": pairs} of the standard library.

    `folder` is the library's folder (default: the running Python's). No prompt is repeated. Raises UserError if there
    is no source, or if a split is empty.
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
                f"set it to {EVAL_FRACTION}, the default, or use your own text: data=jsonl data.train=FILE"
            )
        pairs.sort(key=lambda pair: stable_hash(pair.prompt))
    return splits


def module_pairs(source: Source, *, body: bool = True, max_prompt_chars: int = 400) -> Iterator[Pair]:
    """Yield a pair for each definition whose docstring has a usable first sentence."""
    for node, owner in definitions(source.tree):
        sentence = first_sentence(ast.get_docstring(node) or "")
        if sentence:
            yield Pair(_shortened(source_of(source, node, owner, body=body), max_prompt_chars), sentence)


def first_sentence(docstring: str, max_chars: int = 160) -> str | None:
    """Return the first sentence of a docstring on one line, or None.

    The result is None if the sentence has one word, has code, or is longer than `max_chars` characters (1% of
    sentences).
    """
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
    """Yield every function and class inside `node`, with the class that directly contains it."""
    for block in blocks(node):
        for statement in block:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield statement, owner
                yield from definitions(statement, statement if isinstance(statement, ast.ClassDef) else None)
            else:
                yield from definitions(statement, owner)


def source_of(source: Source, node: Definition, owner: ast.ClassDef | None, *, body: bool = True) -> str:
    """Return a definition's text without docstrings. With `body=False`, return only the signature.

    For a member of a class, the text begins with the first line of the class.
    """
    text = source.without_docstrings(source.line_of(node), source.end(node) if body else source.begin(node.body[0]))
    text = text.rstrip()
    if owner is None:
        return _indented(text, "")
    bases = ", ".join(ast.unparse(base) for base in owner.bases)
    head = f"class {owner.name}({bases}):" if bases else f"class {owner.name}:"
    return head + "\n" + _indented(text, "    ")


def _shortened(text: str, max_chars: int) -> str:
    """Return at most `max_chars` of `text`, cut at a line's end if at least half of `max_chars` is kept."""
    if len(text) <= max_chars:
        return text
    whole_lines = text[: max_chars + 1].rpartition("\n")[0]
    return whole_lines if len(whole_lines) > max_chars // 2 else text[:max_chars]


def _indented(text: str, margin: str) -> str:
    """Return `text` with the first line's indentation replaced by `margin` in every line."""
    old = text[: len(text) - len(text.lstrip())]
    return "\n".join(margin + line.removeprefix(old) if line.strip() else "" for line in text.split("\n"))
