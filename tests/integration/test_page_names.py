"""The pages name only keys, options, files and flags that exist.

Checked are code spans and blocks of commands (bash). In these, a word is

- an override, if it has a `=` and the part before it begins with a group or a key at the top of a config;
- a key, if it is dotted and begins with a group (`trainer.ema`) but has no ending of a file (`optimizer.pt`);
- a file of the repository, if it begins with a folder of the repository (`conf/task/sft.yaml`);
- a flag, if it begins with `--`. Flags of other programs are listed here.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.utils import get_args_parser

from loraplus_hydra.cli.commands import COMMANDS
from loraplus_hydra.config.locations import config_folder
from loraplus_hydra.config.schema import GROUPS, LIBRARY_RANGES, SCHEMAS, PublishedRate, TuneConfig
from tools.docs.hooks import reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/**/*.md"))),
)
FOLDERS = ("conf", "docs", "benchmarks", "tests", "tools", "loraplus_hydra")
ENDINGS = ("py", "yaml", "yml", "json", "jsonl", "pt", "safetensors", "md", "txt", "csv", "html", "png", "log", "bin")
# Flags of torchrun, accelerate, vLLM, pip, tools of this repository, TensorBoard and MLflow.
FOREIGN = {
    "--nproc_per_node",
    "--enable-lora",
    "--lora-modules",
    "--max-lora-rank",
    "--no-deps",
    "--no-build-isolation",
    "--use_deepspeed",
    "--out",
    "--strict",
    "--logdir",
    "--backend-store-uri",
    "--num_processes",
}
# Mappings whose keys anybody may choose, and Hydra's own config.
OPEN = (
    "loraplus.rules.",
    "loraplus.extra_rules.",
    "hydra.",
    "model.config.",
    "adapter.rank_pattern.",
    "adapter.alpha_pattern.",
)
OVERRIDE = re.compile(r"['\"]?[+~]*([a-zA-Z_][\w/]*(?:\.\w+)*)(?:@[\w.]+)?=(.*)", flags=re.DOTALL)
GROUP_FOLDERS = {
    path.name: {option.stem for option in path.glob("*.yaml")}
    for path in config_folder().iterdir()
    if path.is_dir() and any(path.glob("*.yaml"))
}


def flat(value: Any, prefix: str = "") -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{key}"
        yield from flat(inner, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every key that a config can have, with those of the libraries' classes."""
    import peft
    import transformers
    import trl

    keys = set(LIBRARY_RANGES)
    for path in config_folder().rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        in_group = path.parent != config_folder() and "@package _global_" not in text
        keys |= set(flat(yaml.safe_load(text), f"{path.parent.name}." if in_group else ""))
    schemas = {f"{group}.": schema for group, schema in GROUPS.items()}
    schemas |= {"model.published_rate.": PublishedRate, "tune.": TuneConfig, "trainer.": transformers.TrainingArguments}
    for prefix, schema in [
        *schemas.items(),
        *(("", schema) for schema in SCHEMAS.values()),
        *((f"{g}.", s) for g, s in GROUPS.items()),
    ]:
        keys |= {prefix + field.name for field in dataclasses.fields(schema)}
    for config in (trl.SFTConfig, trl.DPOConfig, trl.KTOConfig):
        keys |= {f"task.args.{field.name}" for field in dataclasses.fields(config)}
    for method in (peft.LoraConfig, peft.AdaLoraConfig, peft.VeraConfig):
        keys |= {f"adapter.{field.name}" for field in dataclasses.fields(method)}
    keys |= {f"quantization.{name}" for name in inspect.signature(transformers.BitsAndBytesConfig).parameters}
    return keys


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def words_of(text: str) -> list[str]:
    """Return the words of a page's code spans and command blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    commands = [line.partition(" # ")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", outside)
    return [word for part in (*commands, *spans) for word in part.split()]


def is_known(key: str, known: set[str]) -> bool:
    """Return True for a key of a config, for a key with keys below, and for one below an open mapping."""
    return key in known or key.startswith(OPEN) or any(one.startswith(f"{key}.") for one in known)


def wrong_keys(words: list[str], known: set[str]) -> list[str]:
    tops = {key.split(".")[0] for key in known}
    wrong = []
    for word in words:
        if match := OVERRIDE.fullmatch(word):
            key, value = match.groups()
            if key in GROUP_FOLDERS:
                options = re.findall(r"[a-z]\w*", value)
                wrong += [word for option in options if option not in GROUP_FOLDERS[key] | {"null"}]
        elif re.fullmatch(r"\w+(\.\w+)+", word) and word.rpartition(".")[2] not in ENDINGS:
            key = word
        else:
            continue
        if key not in GROUP_FOLDERS and key.split(".")[0] in tops and not is_known(key, known):
            wrong.append(word)
    return wrong


def missing_files(words: list[str]) -> list[str]:
    files = [word for word in words if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w.\-/*<>]*", word)]
    return [word for word in files if not list(ROOT.glob(re.sub(r"<[^>]*>", "*", word).rstrip("/")))]


def unknown_flags(words: list[str]) -> set[str]:
    hydra = {option for action in get_args_parser()._actions for option in action.option_strings}
    own = {f"--{flag}" for command in COMMANDS.values() for flag in command.flags}
    flags = {word.partition("=")[0].rstrip(",.") for word in words if re.match(r"--[a-z]", word)}
    return flags - hydra - own - FOREIGN


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_exists(page: str, known: set[str]) -> None:
    words = words_of(text_of(page))
    assert wrong_keys(words, known) == []
    assert missing_files(words) == []
    assert unknown_flags(words) == set()


def test_the_reference_names_what_exists(known: set[str]) -> None:
    for page, text in reference().items():
        words = words_of(text)
        assert wrong_keys(words, known) == [], page
        assert missing_files(words) == [], page
        assert unknown_flags(words) == set(), page


def test_names_that_do_not_exist_are_found(known: set[str]) -> None:
    text = """
`trainer.emma` and `+trainer.emma=0.9`, `optimizer=adamww,sgd`, `loraplus.ratioo=4`, `trainer.ema`
`conf/task/nope.yaml`, `docs/nope/<page>.md`, `conf/task/sft.yaml`, `optimizer.pt`, `--josn`, `--json`

```bash
python -m loraplus_hydra adapter.rank=4 adapter.r=4  # `model.nope`
```
"""
    words = words_of(text)
    assert wrong_keys(words, known) == [
        "adapter.rank=4",
        "trainer.emma",
        "+trainer.emma=0.9",
        "optimizer=adamww,sgd",
        "loraplus.ratioo=4",
    ]
    assert missing_files(words) == ["conf/task/nope.yaml", "docs/nope/<page>.md"]
    assert unknown_flags(words) == {"--josn"}


def test_pages_have_names_to_check(known: set[str]) -> None:
    words = [word for page in PAGES for word in words_of(text_of(page))]
    assert sum(bool(OVERRIDE.fullmatch(word)) for word in words) > 300
    assert sum(word in known for word in words) > 100
