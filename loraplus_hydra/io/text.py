"""Escaping of text from rows, names, errors and configs for the place that shows it."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from loraplus_hydra.config.plain import without_credentials

# Control characters except tab and line feed, lone surrogates, and characters that reorder or hide text on a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def visible(text: str) -> str:
    r"""Return `text` with control characters as escapes such as \x1b. Line breaks and tabs are kept."""
    return _CONTROL.sub(_escaped, text.replace("\r\n", "\n"))


def presentable(text: str) -> str:
    """Return `text` with control characters as escapes, and with addresses that have no user and password."""
    return str(without_credentials(visible(text)))


def one_line(text: str) -> str:
    """Return `text` with control characters, line breaks and tabs as escapes."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def json_line(value: Any) -> str:
    """Return `value` as JSON on one line, with control characters as escapes."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def csv_cell(text: str) -> str:
    """Return `text` for a CSV cell, escaped if a spreadsheet would read it as a formula."""
    text = visible(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def markdown(text: str) -> str:
    """Return `text` as Markdown on one line that shows the text literally."""
    return _MARKDOWN.sub(r"\\\1", visible(text)).replace("\n", " ")


def code(text: str) -> str:
    """Return `text` as Markdown code on one line."""
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{one_line(text)}{pad}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Return `text` as a Markdown code block. Backticks in the text don't end the block."""
    fence = "`" * max(3, _longest_run(text) + 1)
    text = visible(text).rstrip("\n")
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


class VisibleFormatter(logging.Formatter):
    """Formats log records with control characters as escapes, and addresses without user and password."""

    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
