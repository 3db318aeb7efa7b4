"""The page of the reference on errors: every message with its remedy, collected from the source."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.docs.markdown import prose

Makers = dict[str, list[str]]  # name of a function that makes an error -> its parameters
Names = dict[str, tuple[ast.expr, Any]]  # name -> its value, and the names that were known when it got it
_GAP = "…"  # stands for a value
_MOST = 6  # texts of one call, if its parts have several forms
_ABOUT = f"""# Errors and remedies

An error is `key: what is wrong; what would be right`. All errors of a config come in one list, and the exit status
is 1. Look for the first words after the key. {_GAP} stands for a value."""


@dataclass(frozen=True, order=True)
class Message:
    """An error: what is wrong, the remedy and the key."""

    what: str
    fix: str
    key: str


def message_page(package: Path) -> str:
    """Return the page as Markdown."""
    found = sorted(set(_messages(package)), key=lambda each: (_first_words(each), each))
    parts = [_ABOUT]
    for letter, group in itertools.groupby(found, key=lambda each: _first_words(each)[0].upper()):
        parts += [f"## {letter}", "\n".join(dict.fromkeys(map(_line, group)))]
    return "\n\n".join(parts) + "\n"


def _first_words(message: Message) -> str:
    return "".join(letter for letter in message.what.lower() if letter.isalpha() or letter == " ").strip()


def _line(message: Message) -> str:
    key = f" (`{message.key}`)" if message.key.strip(_GAP + ".") else ""
    fix = f"<br>→ {prose(message.fix, 'reference')}" if message.fix.strip(_GAP) else ""
    return f"- **{prose(message.what, 'reference')}**{key}{fix}"


def _messages(package: Path) -> Iterator[Message]:
    """Yield the errors of all files."""
    sources = (file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py")))
    modules = [ast.parse(source) for source in sources if re.search(r"Problem\(|UserError\(|\bwhat\b", source)]
    # Problem, UserError, and the functions that make one from their parameter `what`
    makers = {"Problem": ["key", "what", "fix"], "UserError": ["what"]}
    for function in (each for module in modules for each in _functions(module.body)):
        parameters = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
        makers |= {function.name: parameters} if "what" in parameters else {}
    for module in modules:
        found: list[Message] = []
        outside = _walk(module.body, [{}], makers, found)
        for function in _functions(module.body):
            _walk(function.body, outside, makers, found)
        yield from (each for each in found if len(_first_words(each)) > 3)


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Yield the functions and methods of a module, also those inside others."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        yield from _functions(getattr(node, "body", []))


def _walk(body: list[ast.stmt], known: list[Names], makers: Makers, found: list[Message]) -> list[Names]:
    """Collect the errors in statements, and return what is known of names after them.

    The result has an entry for each way through the statements.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        outer = [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr | ast.withitem)]
        for each in (inner for one in outer for inner in ast.walk(one)):
            if isinstance(each, ast.Call):
                found += [message for names in known for message in _of_call(each, names, makers)]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known = [{**names, node.targets[0].id: (node.value, names)} for names in known]
        elif isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try):
            blocks = [node.body, getattr(node, "orelse", []), *(each.body for each in getattr(node, "handlers", []))]
            ways = [_walk(block, known, makers, found) for block in blocks]
            if isinstance(node, ast.With):
                del ways[1:]
            known = [names for way in ways for names in way][:_MOST]
        elif isinstance(node, ast.Return | ast.Raise | ast.Continue | ast.Break):
            return []
    return known


def _of_call(call: ast.Call, names: Names, makers: Makers) -> Iterator[Message]:
    maker = call.func.id if isinstance(call.func, ast.Name) else ""
    if maker not in makers:
        return
    given = dict(zip(makers[maker], call.args, strict=False)) | {
        each.arg: each.value for each in call.keywords if each.arg
    }
    empty = ast.Constant("")
    texts = [_texts(given.get(part, empty), names) for part in ("key", "what", "fix")]
    for key, what, fix in itertools.islice(itertools.product(*texts), _MOST):
        if maker == "UserError":
            what, _, fix = what.partition("; ")
        yield Message(_squeezed(what), _squeezed(fix), _squeezed(key))


def _texts(node: ast.expr, names: Names) -> list[str]:
    """Return the forms that a text can have, with a gap for each value that isn't known."""
    if isinstance(node, ast.Constant):
        return [_GAP if node.value is None else str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return _joined(node.values, names)
    if isinstance(node, ast.FormattedValue):
        is_name = isinstance(node.value, ast.Name | ast.IfExp)
        return _texts(node.value, names) if is_name else [_GAP]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, names) + _texts(node.orelse, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([node.left, node.right], names)
    if isinstance(node, ast.Name) and node.id in names:
        return _texts(*names[node.id])
    return [_GAP]


def _joined(parts: list[ast.expr], names: Names) -> list[str]:
    forms = [_texts(part, names) for part in parts]
    return ["".join(each) for each in itertools.islice(itertools.product(*forms), _MOST)]


def _squeezed(text: str) -> str:
    """Return a text on one line, with a single gap for adjacent ones."""
    words = " ".join(text.split())
    while _GAP * 2 in words:
        words = words.replace(_GAP * 2, _GAP)
    return words
