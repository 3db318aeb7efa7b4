"""The screens of docs/start/terminal.md, captured in tmux.

python -m tools.docs.terminal
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/start/terminal.md"
SHORT = "data.max_samples=800 task.samples=1"
WAIT = 600  # seconds; no command takes longer
_SESSION = "loraplus_hydra_docs"

INTRO = """# What the terminal shows

The program in a terminal of 80 and of 160 columns, captured by `tools/docs/terminal.py`. In a pipe or a file there is
no bar: each logged step is a line.
"""
CHAPTERS = (
    ("While a run trains", f"python -m loraplus_hydra trainer.max_steps=80 {SHORT} hydra.run.dir=run", "30/80"),
    ("While it evaluates", "", "evaluating"),
    ("At its end", "", None),
    ("Evaluate", "python -m loraplus_hydra evaluate run", None),
    ("Sweep", f"python -m loraplus_hydra -m loraplus.ratio=1,8 trainer.max_steps=20 {SHORT}", None),
)
QUESTION = "def add(a, b): return a + b"


def tmux(*arguments: str) -> str:
    return subprocess.run(["tmux", *arguments], check=True, capture_output=True, text=True).stdout


def screen() -> str:
    """Return what the terminal shows now, without what has scrolled away."""
    return tmux("capture-pane", "-p", "-t", _SESSION).rstrip()


def wait_for(text: str, *, end: bool = False) -> str:
    """Return the screen once it shows `text`, at its end or anywhere."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        shown = screen()
        if shown.endswith(text) if end else text in shown:
            return shown
        time.sleep(0.02)
    raise TimeoutError(f"the terminal doesn't show {text!r}:\n{screen()}")


def chapters(width: int, folder: Path) -> str:
    """Run the commands in a terminal of this width, and return its screens as Markdown."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = f"cd {folder} && exec env PATH={path} PYTHONPATH={PAGE.parents[2]} PS1='$ ' bash --norc --noprofile"
    tmux("new-session", "-d", "-s", _SESSION, "-x", str(width), "-y", "40", shell)
    try:
        wait_for("$", end=True)
        parts = [f"## {width} columns"]
        for title, command, shown in CHAPTERS:
            if command:
                tmux("send-keys", "-t", _SESSION, f"clear; {command}", "Enter")
            text = wait_for("\n$", end=True) if shown is None else wait_for(shown)
            parts += [f"### {title}, {width} columns", f"```text\n{text.removesuffix('$').rstrip()}\n```"]
        tmux("send-keys", "-t", _SESSION, "clear; python -m loraplus_hydra chat run max_new_tokens=24", "Enter")
        wait_for(">", end=True)
        for words in (QUESTION, "/base", "/quit"):
            tmux("send-keys", "-t", _SESSION, "-l", words)
            tmux("send-keys", "-t", _SESSION, "Enter")
            time.sleep(1)
            wait_for("$" if words == "/quit" else ">", end=True)
        parts += [f"### Chat, {width} columns", f"```text\n{screen().removesuffix('$').rstrip()}\n```"]
        return "\n\n".join(parts)
    finally:
        tmux("kill-session", "-t", _SESSION)


def main() -> None:
    pages = [INTRO.rstrip()]
    for width in (80, 160):
        with tempfile.TemporaryDirectory() as folder:
            pages.append(chapters(width, Path(folder)).replace(f"{folder}/", ""))
    PAGE.write_text("\n\n".join(pages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
