"""Only the room `io` opens, writes and removes files."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "loraplus_hydra"
# Attributes that write or remove, whatever object they belong to.
WRITING = {"write_text", "write_bytes", "unlink", "rmtree", "mkdtemp", "copytree", "mkdir", "rename", "touch"}
WRITING |= {"symlink_to", "hardlink_to", "makedirs", "removedirs", "copyfile", "copy2", "truncate"}
READING = {"open", "read_text", "read_bytes"}
ROOM = {"files", "folders"}  # modules of io, by the names under which they are imported
EXCEPTIONS = {
    # Files that the user names in the config: they may be links and pipes, and are only read.
    "check/weights.py": {"read_text"},
    "data/glue.py": {"open"},
    "data/hub.py": {"read_text"},
    "data/streams.py": {"open"},
    "tasks/template.py": {"read_text"},
    "training/deepspeed_settings.py": {"read_text"},
    # The cache of `datasets`, whose folder the user names; `data` imports no `io`.
    "data/cache.py": {"open", "mkdir", "read_bytes"},
    # Files of the package itself.
    "data/embedded/source.py": {"read_bytes"},
    "loraplus/presets.py": {"read_text"},
    "report/page.py": {"read_text"},
    # /proc, which holds no files.
    "training/lean/frozen.py": {"read_text"},  # /proc/cpuinfo
    "training/measure.py": {"read_text", "write_text"},
}


def calls(file: Path) -> set[str]:
    """Return the names of calls in a module that open, write or remove files, without those of `io`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found |= names & {"shutil"}
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "open":
            found.add("open")
        if isinstance(node.func, ast.Attribute) and node.func.attr in WRITING | READING:
            owner = node.func.value
            if not (isinstance(owner, ast.Name) and owner.id in ROOM):
                found.add(node.func.attr)
    return found


def test_files_are_opened_in_one_room() -> None:
    modules = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    used = {name: calls(path) for name, path in modules.items() if not name.startswith("io/")}
    assert {name: found for name, found in used.items() if found} == EXCEPTIONS
