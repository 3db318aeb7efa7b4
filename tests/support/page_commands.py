"""The commands that the pages show, in blocks of bash."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraplus_hydra.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (*map(ROOT.joinpath, OUTSIDE), *sorted(ROOT.glob("docs/**/*.md")))
}
PROGRAM = "python -m loraplus_hydra"
# Words of a command block or of the paragraph before it, for what a test can't run.
MARKS = ("needs a GPU", "needs a network")
_PROGRAM = re.compile(r"^(?:\w+=\S+ )*(?:python -m loraplus_hydra|loraplus-hydra|torchrun .*?-m loraplus_hydra)\b(.*)$")
_BLOCK = re.compile(r"(?:^|\n)([^\n]*(?:\n(?!\n|```)[^\n]+)*)\n*```bash\n(.*?)```", flags=re.DOTALL)


@dataclass(frozen=True)
class PageCommand:
    """A command of a page. `marked` is True if the page says that it needs a GPU or a network."""

    page: str
    line: str
    marked: bool

    @property
    def is_ours(self) -> bool:
        return _PROGRAM.match(self.line) is not None

    @property
    def words(self) -> list[str]:
        match = _PROGRAM.match(self.line)
        assert match is not None
        return shlex.split(match[1])

    @property
    def trains_or_checks(self) -> bool:
        """True if it composes a run's config, rather than opening a finished run or a sweep."""
        words = self.words
        return not words or words[0] not in COMMANDS or COMMANDS[words[0]].config == "config"


def page_commands() -> list[PageCommand]:
    """Return each command of the pages once."""
    found: dict[str, PageCommand] = {}
    for page in PAGES:
        for command in _of_page(page):
            found.setdefault(command.line, command)
    return list(found.values())


def _of_page(page: str) -> Iterator[PageCommand]:
    for before, block in _BLOCK.findall(PAGES[page].read_text(encoding="utf-8")):
        of_block = any(mark in before for mark in MARKS)
        for line in block.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition(" # ")
            if command.strip() and not command.startswith("#"):
                yield PageCommand(page, command.strip(), of_block or any(mark in comment for mark in MARKS))
