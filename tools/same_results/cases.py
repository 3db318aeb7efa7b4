"""The runs by which two checkouts are compared, and their rows and model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

RUN, DONE, LOG = "run", "done.json", "log.txt"  # in a case's folder: what the program wrote, what was asked, its output
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "tokenizers", "numpy")
POLL_SECONDS = 0.005  # between looks for a checkpoint; a step takes a hundred times as long

# An editable install answers for a module that the checkout lacks, with another checkout's: it is taken out first.
DETACH = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""
PROGRAM = DETACH + "runpy.run_module('loraplus_hydra', run_name='__main__', alter_sys=True)"
WHERE = DETACH + "import loraplus_hydra; print(loraplus_hydra.__file__)"


@dataclass(frozen=True)
class Case:
    """Name a command line; `{inputs}` in an override is the folder of rows and models."""

    name: str
    overrides: tuple[str, ...]
    folder_key: str = "hydra.run.dir"  # the key that says where it writes
    killed: bool = False  # with SIGKILL at its first whole checkpoint, and then resumed

    def words(self, inputs: Path, folder: Path) -> list[str]:
        """Spell out the command line with which the case writes into `folder`."""
        return [*(text.format(inputs=inputs) for text in self.overrides), f"{self.folder_key}={folder}"]

    def reads_inputs(self) -> bool:
        """Tell whether the case reads anything of that folder."""
        return any("{inputs}" in text for text in self.overrides)


@dataclass(frozen=True)
class Side:
    """Name one of the two checkouts: `before` or `after`, and where it lies."""

    name: str
    checkout: Path

    def plain_forward(self) -> list[str]:
        """Return the override for the plain forward.

        Older checkouts have only this forward, and no key for it.
        """
        trainer = (self.checkout / "conf" / "trainer" / "default.yaml").read_text(encoding="utf-8")
        return ["trainer.forward=plain"] if re.search(r"^forward:", trainer, re.MULTILINE) else []

    def code(self) -> str:
        """Name the program's present code and configs, by a hash of their bytes."""
        return fingerprint(self.checkout, "loraplus_hydra", "conf")


SHORT = ("trainer.max_steps=10", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=4")
CASES = (
    Case("default", ("trainer.max_steps=60",)),
    Case("adamw8bit", ("trainer.max_steps=60", "optimizer=adamw8bit", "loraplus.ratio=16")),
    Case(
        "classification",
        (
            *("task=classification", "model=hub", "model.path={inputs}/bert", "data=jsonl"),
            *("data.train={inputs}/labels.jsonl", "data.eval={inputs}/labels.jsonl", "optimizer.lr=0.005", *SHORT),
        ),
    ),
    Case("text", ("task=text", "data=text", "data.train={inputs}/book.txt", "task.block_size=64", *SHORT)),
    Case("dpo", ("task=dpo", "data=jsonl", "data.train={inputs}/preferences.jsonl", "data.eval_fraction=0.25", *SHORT)),
    Case(
        "sweep",
        (
            *("-m", "loraplus.ratio=1,4", "seed=1,2", "data.max_samples=80", "trainer.max_steps=5"),
            *("trainer.logging_steps=1", "trainer.eval_strategy=no"),
        ),
        folder_key="hydra.sweep.dir",
    ),
    Case(
        "resume",
        (
            *("data.max_samples=160", "trainer.max_steps=30", "trainer.save_steps=10"),
            *("trainer.logging_steps=1", "trainer.eval_strategy=no"),
        ),
        killed=True,
    ),
)


def run_side(side: Side, cases: Iterable[Case], work: Path, threads: int) -> None:
    """Run those of the cases whose outputs aren't there yet, or are of other code, inputs or libraries."""
    refuse_other_code(side, threads)
    inputs = work / "inputs"
    write_inputs(inputs)
    for case in cases:
        place = work / side.name / case.name
        words = [*case.words(inputs, place / RUN), *side.plain_forward()]
        asked = {
            "words": words,
            "threads": threads,
            "code": side.code(),
            "inputs": fingerprint(inputs) if case.reads_inputs() else "",
            "versions": versions(),
        }
        if asked.items() <= _stored(place / DONE).items():
            print(f"{side.name} {case.name}: there already", flush=True)
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        began = time.perf_counter()
        run_case(case, words, side, place, threads)
        seconds = round(time.perf_counter() - began, 1)
        (place / DONE).write_text(json.dumps({**asked, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")
        print(f"{side.name} {case.name}: {seconds} s", flush=True)


def run_case(case: Case, words: list[str], side: Side, place: Path, threads: int) -> None:
    """Run one case to its end in an empty folder."""
    if case.killed:
        kill_at_checkpoint(words, side, place, threads)
        words = ["resume", str(place / RUN)]
    process = start(words, side, place, threads)
    try:
        status = process.wait()
    finally:
        process.kill()
    if status != 0:
        raise SystemExit(f"{side.name} {case.name} ended with status {status}:\n{_tail(place / LOG)}")


def kill_at_checkpoint(words: list[str], side: Side, place: Path, threads: int) -> None:
    """Run a command line until its first checkpoint is whole, and kill it there."""
    process = start(words, side, place, threads)
    try:
        while not list((place / RUN).glob("checkpoints/*/manifest.json")):
            if process.poll() is not None:
                raise SystemExit(f"{side.name}: the run ended before it was killed:\n{_tail(place / LOG)}")
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
    if (place / RUN / "result.json").exists():
        raise SystemExit(f"{side.name}: the run had finished before it was killed; try again")


def start(words: list[str], side: Side, place: Path, threads: int) -> subprocess.Popen[bytes]:
    """Start the program of a checkout; what it prints goes to the case's log."""
    with (place / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            cwd=side.checkout,
            env=environment(place / "cache", threads),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def environment(cache: Path, threads: int) -> dict[str, str]:
    """Set what a run is started with.

    No network, no GPU, so many threads, and nothing cached by another side.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HYDRA"))}
    count = str(threads)
    return inherited | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache),  # rows that the other side has tokenised would hide a change in how
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONHASHSEED": "0",
    }


def refuse_other_code(side: Side, threads: int) -> None:
    """End the program unless package and configs are read from the side's own checkout."""
    package = _output(["-c", WHERE], side, threads)
    configs = re.search(r"\bmain\b.*file://(\S+)", _output(["-c", PROGRAM, "--info", "searchpath"], side, threads))
    for what, found in (("package", package.strip()), ("configs", configs[1] if configs else "nowhere")):
        if not Path(found).resolve().is_relative_to(side.checkout):
            raise SystemExit(f"{side.name}: {what} would be read from {found}, not from {side.checkout}")


def fingerprint(folder: Path, *parts: str) -> str:
    """Name the files of a folder, or of some folders in it, by a hash of their names and bytes."""
    found = hashlib.sha256()
    files = (path for part in parts or (".",) for path in (folder / part).rglob("*") if path.is_file())
    for path in sorted(files):
        if "__pycache__" not in path.parts:
            found.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """List the versions of what results depend on besides the checkout."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}}


def _output(arguments: list[str], side: Side, threads: int) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=side.checkout,
        env=environment(side.checkout, threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{side.name}: the program doesn't start:\n{done.stderr[-2000:]}")
    return done.stdout


def _stored(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _tail(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")[-3000:]


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    *("a", "after", "and", "arrived", "brown", "card", "dog", "failed", "fox", "has"),
    *("is", "lazy", "not", "number", "payment", "quick", "say", "the", "two"),
)
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *WORDS, *map(str, range(10))))}
HIDDEN, INNER, POSITIONS = 16, 32, 32


def write_inputs(folder: Path) -> None:
    """Write rows for each task, and a BERT of one layer.

    The same bytes at each call, so both sides read the same.
    """
    draft = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    write_bert(draft / "bert")
    labels = [{"text": _sentence(number), "label": "ab"[number % 2]} for number in range(48)]
    preferences = [
        {"prompt": f"say {number}", "chosen": f"the number {number}", "rejected": f"{_sentence(number)}, not {number}"}
        for number in range(48)
    ]
    for name, rows in (("labels", labels), ("preferences", preferences)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (draft / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (draft / "book.txt").write_text("".join(f"{_sentence(number)}.\n" for number in range(600)), encoding="utf-8")
    if folder.is_dir() and fingerprint(folder) == fingerprint(draft):
        shutil.rmtree(draft)
        return
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def write_bert(folder: Path) -> None:
    """Write a BERT encoder without a classification head, and its tokenizer of whole words."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": VOCABULARY["[PAD]"],
    }
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **names,
    }
    for name, content in (("config", config), ("tokenizer_config", settings), ("tokenizer", _tokenizer())):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(_bert_tensors(), folder / "model.safetensors", {"format": "pt"})


def _bert_tensors() -> dict[str, Any]:
    """Draw the encoder's weights; a norm's are ones, a bias's zeros."""
    layer = "encoder.layer.0"
    linears = {
        **{f"{layer}.attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")},
        f"{layer}.attention.output.dense": (HIDDEN, HIDDEN),
        f"{layer}.intermediate.dense": (INNER, HIDDEN),
        f"{layer}.output.dense": (HIDDEN, INNER),
        "pooler.dense": (HIDDEN, HIDDEN),
    }
    rows = {"word": len(VOCABULARY), "position": POSITIONS, "token_type": 2}
    embeddings = {f"embeddings.{name}_embeddings": (count, HIDDEN) for name, count in rows.items()}
    chance = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        f"{name}.weight": 0.4 * chance.standard_normal(shape) for name, shape in (embeddings | linears).items()
    }
    tensors |= {f"{name}.bias": np.zeros(shape[0]) for name, shape in linears.items()}
    for owner in ("embeddings", f"{layer}.attention.output", f"{layer}.output"):
        tensors |= {f"{owner}.LayerNorm.weight": np.ones(HIDDEN), f"{owner}.LayerNorm.bias": np.zeros(HIDDEN)}
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def _tokenizer() -> dict[str, Any]:
    """Describe a tokenizer of whole words as the tokenizers library stores it: [CLS] text [SEP]."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ends = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    single = [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    known = {name: {"id": name, "ids": [VOCABULARY[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": VOCABULARY[name], "content": name, **flags, "special": True} for name in SPECIAL],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"},
    }


def _sentence(number: int) -> str:
    """Make up a sentence of five words and a number."""
    words = (WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 7, 11, 13))
    return f"{' '.join(words)} {number % 10}"
