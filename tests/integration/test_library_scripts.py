"""Scripts of a new user: each runs in another folder, and type-checks there under `mypy --strict`."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplus_hydra.io.result import read_result
from tests.support.tiny import write_jsonl

ROOT = Path(__file__).resolve().parents[2]

# Cells of a notebook are separated by `# %%`.
SCRIPTS = {
    "LoraPlus": """
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from loraplus_hydra import LoraPlus, with_loraplus

model = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(target_modules="all-linear"))
trainer = with_loraplus(SFTTrainer)(
    model=model,
    args=SFTConfig(output_dir="run", max_steps=2, lr_scheduler_type="cosine", use_cpu=True, report_to="none"),
    train_dataset=Dataset.from_list([{"prompt": "say one", "completion": " one"}] * 8),
    processing_class=AutoTokenizer.from_pretrained("model"),
    loraplus=LoraPlus(lr=1e-3, ratio=8),
)
trainer.train()
outcome = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
""",
    "create_loraplus_optimizer": """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loraplus_hydra import create_loraplus_optimizer

model = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(target_modules="all-linear"))
optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
tokens = torch.arange(8).repeat(2, 1)
for _ in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
outcome = {group["name"]: group["lr"] for group in optimizer.param_groups if group["params"]}
""",
    "run": """
from hydra import compose, initialize_config_module

from loraplus_hydra import run

# %%
overrides = ["model=hub", "model.path=model", "data=jsonl", "data.train=rows.jsonl", "trainer=cpu", "task.samples=0"]
overrides += ["trainer.max_steps=2", "trainer.logging_steps=1", "optimizer.lr=1e-3", "loraplus.ratio=8"]
with initialize_config_module("loraplus_hydra.conf", version_base="1.3"):
    config = compose("config", overrides=overrides)
# %%
result = run(config)
# %%
outcome = {"status": result.status, "steps": result.steps}
""",
}


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which has a model and rows."""
    (tmp_path / "model").symlink_to(llama_folder, target_is_directory=True)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(20)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(name: str) -> object:
    """Execute a script cell by cell, as a notebook does, and return its `outcome`."""
    names: dict[str, object] = {}
    for cell in SCRIPTS[name].split("# %%"):
        exec(compile(cell, name, "exec"), names)
    return names["outcome"]


@pytest.mark.parametrize("name", ["LoraPlus", "create_loraplus_optimizer"])
def test_scripts_train_lora_B_eight_times_faster(name: str, folder: Path) -> None:
    assert outcome(name) == pytest.approx({"groupA": 1e-3, "groupB": 8e-3})


@pytest.fixture
def fresh_logging() -> Iterator[None]:
    """Log levels as in a new process: a command that ran before in this one has left Hydra's."""
    loggers = [logging.getLogger(), logging.getLogger("loraplus_hydra")]
    levels = [logger.level for logger in loggers]
    for logger, level in zip(loggers, (logging.WARNING, logging.NOTSET), strict=True):
        logger.setLevel(level)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_run_in_a_notebook_needs_no_folder_of_hydra_and_prints_its_progress(
    folder: Path, capsys: pytest.CaptureFixture[str], fresh_logging: None
) -> None:
    assert outcome("run") == {"status": "ok", "steps": 2}
    printed = capsys.readouterr().out
    assert "step 2 of 2: loss" in printed
    assert printed.count("5/6 Training") == 1
    (result,) = folder.glob("outputs/*-*-*/*-*-*/result.json")
    assert str(result.parent.relative_to(folder)) in printed
    stored = read_result(result.parent)
    assert stored is not None
    assert stored.status == "ok"


@pytest.mark.slow
def test_scripts_type_check_under_strict_mypy_from_another_folder(tmp_path: Path) -> None:
    # datasets has no types, and trl exports its classes without __all__.
    settings = "[mypy]\nstrict = true\n[mypy-datasets.*]\nignore_missing_imports = true\n"
    (tmp_path / "mypy.ini").write_text(settings + "[mypy-trl.*]\nimplicit_reexport = true\n")
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    wrong = "from loraplus_hydra import LoraPlus\n\nLoraPlus(learning_rate=1)\n"  # shows that the types are read
    (tmp_path / "wrong.py").write_text(wrong)
    names = [f"{name}.py" for name in (*SCRIPTS, "wrong")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert errors, done.stdout + done.stderr
    assert all(line.startswith("wrong.py:3: error:") for line in errors), done.stdout


@pytest.mark.slow
def test_an_editable_install_in_strict_mode_shows_type_checkers_the_package(tmp_path: Path) -> None:
    import shutil
    import zipfile

    source = tmp_path / "source"
    for name in ("loraplus_hydra", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta; build_meta.build_editable('..', {'editable_mode': 'strict'})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (link,) = [name for name in archive.namelist() if name.endswith(".pth")]
        linked = Path(archive.read(link).decode().strip())
    assert (linked / "loraplus_hydra" / "py.typed").is_file()
    assert (linked / "loraplus_hydra" / "conf" / "run.yaml").is_file()
