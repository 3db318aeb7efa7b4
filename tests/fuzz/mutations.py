"""Mutations of the folders that runs and sweeps leave: what a bad disk, a bad tool or a bad neighbour makes of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from loraplus_hydra.io.checkpoints import MANIFEST, seal

HUGE = 20 * 2**30  # bytes of a sparse file
READ = 2**21  # bytes of a file that is changed
# What is put in place of a value in JSON or YAML.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**70), 0.5, 1e308, float("nan"), float("inf"), "", " ", "x"),
    *(
        "0",
        "null",
        "\x00",
        "\x1b[31mx",
        "\ud800",
        "${oc.env:HOME}",
        "${seed}",
        "../..",
        "/etc/passwd",
        "~",
        "x" * 10_000,
    ),
    *("os.system", "torch.load", "(a+)+$", "{{ 1 }}", "{% for x in range(10**9) %}{% endfor %}", [], {}, [[]], [None]),
    *([1, 2, 3], ["x"] * 1000, {"": 1}, {"a": {"b": [1]}}, {"_target_": "os.system", "command": "exit 3"}, {"0": "x"}),
)
FIELDS = (  # names that readers know, put beside the others
    *("auto_map", "_attn_implementation", "base_model_name_or_path", "peft_type", "task_type", "rank_pattern"),
    *(
        "alpha_pattern",
        "modules_to_save",
        "target_parameters",
        "layers_to_transform",
        "layer_replication",
        "corda_config",
    ),
    *("trainable_token_indices", "loftq_config", "eva_config", "arrow_config", "lora_bias", "fan_in_fan_out", "bias"),
    *("quantization_config", "model_type", "architectures", "vocab_size", "torch_dtype", "dtype", "tokenizer_class"),
    *("chat_template", "added_tokens_decoder", "extra_special_tokens", "model_max_length", "padding_side", "eos_token"),
    *("id2label", "label2id", "problem_type", "num_labels", "metrics", "best", "error", "samples", "swept", "left"),
    *("trust_remote_code", "revision", "tokenizer", "_target_", "_args_", "defaults", "hydra", "sweep"),
)


def mutate(folder: Path, guard: Path, dice: random.Random, areas: tuple[str, ...]) -> list[str]:
    """Change a folder in one or two ways and describe them; `areas` are the parts that a command reads."""
    done: list[str] = []
    for file in _files(folder, dice, areas):
        # Moved, or already made too long to be read here; no file of an unchanged folder is as long
        if not file.is_file() or file.stat().st_size > READ:
            continue
        kind = dice.choice([name for name, weight in WEIGHTS.items() for _ in range(weight)])
        try:
            said = KINDS[kind](file, guard, dice)
        except RecursionError:  # the first change has nested it too deep to be read
            continue
        done.append(f"{kind}: {file.relative_to(folder)}{said}")
        checkpoint = next((each for each in file.parents if (each / MANIFEST).is_file()), None)
        # A bad neighbour would write the manifest anew.
        if checkpoint is not None and file.name != MANIFEST and kind not in UNSEALED and dice.random() < 0.7:
            with suppress(OSError, RecursionError):
                seal(checkpoint)
                done[-1] += ", sealed"
    return done


def _files(folder: Path, dice: random.Random, areas: tuple[str, ...]) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = []
    for _ in range(dice.choice((1, 1, 2))):
        area = dice.choice(areas)
        read = [path for path in files if path.name == area or area in path.relative_to(folder).parts]
        chosen.append(dice.choice(read if read and dice.random() < 0.9 else files))
    return chosen


def _flipped(file: Path, guard: Path, dice: random.Random) -> str:
    content = bytearray(file.read_bytes())
    for _ in range(min(len(content), dice.choice((1, 1, 8, 100)))):
        # The first bytes matter most: headers, names, opening brackets.
        content[dice.randrange(min(len(content), dice.choice((64, 2048, len(content)))))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return ""


def _cut(file: Path, guard: Path, dice: random.Random) -> str:
    content = file.read_bytes()
    size = dice.choice((0, 1, len(content) // 2, max(0, len(content) - 1)))
    file.write_bytes(content[:size])
    return f" to {size} bytes"


def _appended(file: Path, guard: Path, dice: random.Random) -> str:
    with file.open("ab") as stream:
        stream.write(dice.choice((b"\x00" * 100, b"}", b"\n{}\n", b"\xff\xfe", dice.randbytes(1000))))
    return ""


def _value(file: Path, guard: Path, dice: random.Random) -> str:
    """Replace, remove or add a value where the file holds some, else flip bytes."""
    try:
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        place = dice.randrange(len(lines))
        document = yaml.safe_load(lines[place]) if file.suffix == ".yaml" else json.loads(lines[place])
        said, document = _changed(document, dice)
        lines[place] = (
            yaml.safe_dump(document, sort_keys=False) if file.suffix == ".yaml" else json.dumps(document, indent=None)
        )
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    except (ValueError, yaml.YAMLError, UnicodeError):
        return _flipped(file, guard, dice)
    return f" {said}"


def _changed(document: Any, dice: random.Random) -> tuple[str, Any]:
    above: Any = None
    key: Any = None
    node, path = document, ""
    while isinstance(node, (dict, list)) and node and (above is None or dice.random() < 0.75):
        above, key = node, dice.choice(list(node)) if isinstance(node, dict) else dice.randrange(len(node))
        node, path = node[key], f"{path}/{key}"
    if above is None:
        value = dice.choice(ODD)
        return f"= {str(value)[:60]!r}", value
    if dice.random() < 0.15:
        del above[key]
        return f"{path[:80]} removed", document
    value = _near(node, dice) if dice.random() < 0.4 else dice.choice(ODD)
    if isinstance(above, dict) and dice.random() < 0.2:
        key = dice.choice(FIELDS)
        path = f"{path.rpartition('/')[0]}/{key}"
    above[key] = value
    return f"{path[:80]} = {str(value)[:60]!r}", document


def _near(value: Any, dice: random.Random) -> Any:
    """A value of another type or size that looks like the old one."""
    if isinstance(value, bool):
        return dice.choice((not value, int(value), str(value)))
    if isinstance(value, (int, float)):
        return dice.choice((-value, value + 1, value * 1000, str(value), float(value), [value], value / 2))
    if isinstance(value, str):
        return dice.choice((value * 2, value[:-1], value.upper(), [value], {value: value}, f"{value}\n", f"../{value}"))
    return dice.choice(([value], str(value), {"x": value}))


def _tensors(file: Path, guard: Path, dice: random.Random) -> str:
    """Change the header of safetensors, else a value."""
    if file.suffix != ".safetensors":
        return _value(file, guard, dice)
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    if dice.random() < 0.15:
        file.write_bytes(struct.pack("<Q", dice.choice((0, 1, 2**40, 2**63, size + 8))) + content[8:])
        return " length of its header"
    if dice.random() < 0.2:  # a further tensor of zeros
        elements = dice.choice((1, 2**20, 2**30))
        header["more"] = {"dtype": "F32", "shape": [elements], "data_offsets": [len(rest), len(rest) + 4 * elements]}
        said = f" {4 * elements} bytes more"
    else:
        name = dice.choice([name for name in header if name != "__metadata__"])
        said, entry = _changed({name: header.pop(name)}, dice)
        header |= entry
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text + rest)
        if "more" in header:
            stream.truncate(8 + len(text) + header["more"]["data_offsets"][1])
    return f" header{said}"


def _removed(file: Path, guard: Path, dice: random.Random) -> str:
    file.unlink()
    return ""


def _other_content(file: Path, guard: Path, dice: random.Random) -> str:
    others = [path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file]
    if not others:
        return _cut(file, guard, dice)
    other = dice.choice(others)
    shutil.copyfile(other, file)
    return f" is {other.name}"


def _link(file: Path, guard: Path, dice: random.Random) -> str:
    inside = file.with_name(f"moved-{file.name}")
    target = dice.choice((guard / "file.txt", Path("/dev/zero"), Path("nowhere"), file, inside, guard / file.name))
    if target == inside:
        file.rename(inside)
    file.unlink(missing_ok=True)
    file.symlink_to(target)
    return f" -> {target.name}"


def _linked_folder(file: Path, guard: Path, dice: random.Random) -> str:
    """Replace the file's folder by a link to it in another place."""
    place = file.parent
    outside = guard / "folders" / place.name
    if outside.exists() or not (place / "..").resolve().name.startswith(("trial", "checkpoints", "copy", "good")):
        return _link(file, guard, dice)
    subprocess.run(["mv", place, outside], check=True)
    place.symlink_to(outside)
    return " by its folder"


def _further_link(file: Path, guard: Path, dice: random.Random) -> str:
    names = ("tokenizer.model", "chat_template.jinja", "model.safetensors", ".x.unfinished", "vocab.json", "x")
    link = file.with_name(dice.choice(names))
    with suppress(FileExistsError):
        link.symlink_to(dice.choice((guard / "file.txt", guard, Path("/dev/zero"), Path(".."))))
    return f" beside it: {link.name}"


def _fifo(file: Path, guard: Path, dice: random.Random) -> str:
    if dice.random() < 0.7:
        file.unlink()
    else:
        file = file.with_name(dice.choice(("chat_template.jinja", "x.json", "merges.txt")))
    with suppress(FileExistsError):
        os.mkfifo(file)
    return f" ({file.name})"


def _socket(file: Path, guard: Path, dice: random.Random) -> str:
    file.unlink()
    with suppress(OSError), socket.socket(socket.AF_UNIX) as made:  # its path may be too long
        made.bind(str(file))
    return ""


def _folder(file: Path, guard: Path, dice: random.Random) -> str:
    file.unlink()
    (file / "inside").mkdir(parents=True)
    return ""


def _deep(file: Path, guard: Path, dice: random.Random) -> str:
    depth = dice.choice((200, 5_000, 200_000))
    opening, closing = dice.choice((("[", "]"), ('{"a":', "}")))
    text = opening * depth + ("1" if opening != "[" else "") + closing * depth
    file.write_text(f'{{"x": {text}}}\n' if dice.random() < 0.7 else text)
    return f" {depth} levels"


def _deep_folders(file: Path, guard: Path, dice: random.Random) -> str:
    place, depth = file.parent, 0
    here = os.open(place, os.O_RDONLY)
    with suppress(OSError):
        for depth in range(1, dice.choice((50, 1_500))):  # noqa: B007
            os.mkdir("d", dir_fd=here)
            further = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = further
    os.close(here)
    return f" {depth} folders beside it"


def _huge(file: Path, guard: Path, dice: random.Random) -> str:
    """Make the file huge without taking room on the disk; a manifest that lists it may have its size."""
    manifest = file.parent / MANIFEST
    if manifest.is_file() and file != manifest:
        with suppress(ValueError, KeyError):
            listed = json.loads(manifest.read_text())
            listed["files"][file.name]["size"] = HUGE
            manifest.write_text(json.dumps(listed))
    os.truncate(file, HUGE)
    return ""


def _long(file: Path, guard: Path, dice: random.Random) -> str:
    """Fill the file with as much JSON as takes the most memory."""
    megabytes = dice.choice((4, 60, 200))
    item = dice.choice(("[],", "{},", '"",', "1.5,"))
    text = f"[{item * (megabytes * 2**20 // len(item))}0]"
    file.write_text(text if dice.random() < 0.5 else f'{{"x": {text}}}' if file.suffix != ".jsonl" else "{}\n" * 2**21)
    return f" {megabytes} MB of {item}"


def _many(file: Path, guard: Path, dice: random.Random) -> str:
    for number in range(2_000):
        (file.parent / f"x{number}").touch()
    return " 2,000 files beside it"


Kind = Callable[[Path, Path, random.Random], str]
KINDS: dict[str, Kind] = {
    "flipped": _flipped,
    "cut": _cut,
    "appended": _appended,
    "value": _value,
    "tensors": _tensors,
    "removed": _removed,
    "other content": _other_content,
    "link": _link,
    "linked folder": _linked_folder,
    "further link": _further_link,
    "fifo": _fifo,
    "socket": _socket,
    "folder": _folder,
    "deep": _deep,
    "deep folders": _deep_folders,
    "huge": _huge,
    "long": _long,
    "many": _many,
}
WEIGHTS = {name: {"value": 14, "tensors": 4, "flipped": 5}.get(name, 1) for name in KINDS} | {"many": 1, "huge": 2}
UNSEALED = ("huge", "fifo", "link", "deep folders")
