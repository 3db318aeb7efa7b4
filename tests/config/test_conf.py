"""The YAML files as documentation: each says which command uses it, and every key says what it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loraplus_hydra.config.locations import config_folder

FILES = sorted(path.relative_to(config_folder()).as_posix() for path in config_folder().rglob("*.yaml"))
KEY = re.compile(r"^\s*(- )?['\"]?[\w/@.]+['\"]?:")
WITHOUT_COMMAND = ("app.yaml", "run.yaml")


@pytest.mark.parametrize("name", FILES)
def test_option_is_headed_by_the_command_that_uses_it(name: str) -> None:
    head = (config_folder() / name).read_text().splitlines()[:3]
    if name not in WITHOUT_COMMAND:
        group, option = Path(name).parent.as_posix(), Path(name).stem
        used = [f"{group}={option}"] if group != "." else [""]
        lines = [line for line in head if line.startswith("# ") and ("loraplus_hydra" in line or "torchrun" in line)]
        assert lines, f"{name} has no line '# python -m loraplus_hydra ...' at its head"
        assert any(words in lines[0] for words in used), f"{name}: the command doesn't choose it: {lines[0]}"
    assert all(line.startswith("#") for line in head[:1])


def lines_without_comment(text: str) -> list[str]:
    """Lines with a key but no comment; text of a block scalar and the defaults list (named by its groups) don't."""
    missing, block, defaults = [], None, False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None:
            if not line.strip() or indent > block:
                continue
            block = None
        if re.match(r"^\S", line):
            defaults = line.startswith("defaults:")
        if line.rstrip().endswith("|"):
            block = indent
        # A key that only opens a mapping or list is explained by what is in it or by a comment of its own.
        opens = re.match(r"^\s*(- )?['\"]?[\w/@.]+['\"]?:\s*\|?\s*$", line)
        if KEY.match(line) and "#" not in line and not opens and not defaults:
            missing.append(line)
    return missing


def keys_with_comment(text: str) -> set[str]:
    """Keys with a comment behind them, and those that a comment of their own explains: `#   key, key: ...`."""
    explained = re.findall(r"^\s*(\w+):.*#", text, flags=re.MULTILINE)
    for names in re.findall(r"^#   (\w+(?:, \w+)*): \S", text, flags=re.MULTILINE):
        explained += names.split(", ")
    return set(explained)


@pytest.mark.parametrize("name", FILES)
def test_every_key_has_a_comment_in_its_file_or_for_models_in_hub_yaml(name: str) -> None:
    text = (config_folder() / name).read_text()
    if name.startswith("loraplus/"):  # a rule's keys are the rule language; each rule has its comment
        text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    missing = lines_without_comment(text)
    if name.startswith("model/"):  # fifteen named models have the same keys
        shared = keys_with_comment((config_folder() / "model" / "hub.yaml").read_text())
        missing = [line for line in missing if line.split(":")[0].strip() not in shared]
    assert missing == []


def test_hub_yaml_explains_no_key_that_no_model_has() -> None:
    files = [path.read_text() for path in (config_folder() / "model").glob("*.yaml")]
    used = {key for text in files for key in re.findall(r"^\s*(\w+):", text, flags=re.MULTILINE)}
    assert keys_with_comment((config_folder() / "model" / "hub.yaml").read_text()) <= used


def test_interpolations_are_relative_so_that_others_can_nest_a_run() -> None:
    for name in FILES:
        if name in ("app.yaml",) or name.startswith(("hparams_search", "hydra/")):
            continue
        text = (config_folder() / name).read_text()
        for inside in re.findall(r"\$\{([^}]*)\}", text):
            assert inside.startswith((".", "now:", "hydra:")) or ":" in inside, f"{name}: ${{{inside}}}"
