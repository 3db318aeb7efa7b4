"""Texts of the sources as Markdown."""

from __future__ import annotations

import functools
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CODE = re.compile(r"(`[^`]+`|https://[^\s),;]+|docs/[\w/-]+\.md)")


def prose(text: str, folder: str) -> str:
    """Return a comment as Markdown, with links. `folder` is the folder of the page inside docs/."""
    return "".join(_part(part, folder) for part in _CODE.split(text))


def code(text: str) -> str:
    """Return a code span."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


@functools.cache
def _title(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _part(part: str, folder: str) -> str:
    if part.startswith("`"):
        return part
    if part.startswith("https://"):
        address = part.rstrip(".")
        return f"<{address}>{part[len(address) :]}"
    if part.startswith("docs/"):
        page = part.removeprefix("docs/")
        return f"[{_title(part)}]({posixpath.relpath(page, folder)})"
    escaped = re.sub(r"([\\*\[\]|^~])", r"\\\1", part)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped).replace("<", "&lt;")
