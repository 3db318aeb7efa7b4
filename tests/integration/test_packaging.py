"""The package as others get it: a wheel, and a second repository that composes its configs into its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
defaults:
  - /run@lora
  - override /model@lora.model: hub
  - override /data@lora.data: jsonl
  - override /adapter@lora.adapter: rslora
  - _self_

hydra:
  searchpath: [pkg://loraplus_hydra.conf]
  run:
    dir: results

who: a made-up repository
lora:
  loraplus:
    ratio: 4
  trainer:
    max_steps: 2
  task:
    samples: 0
"""
PROGRAM = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config):
    from loraplus_hydra import run

    print("METRIC", run(config.lora).value)

main()
"""

# Parts of the second repository's own, which its config names.
PARTS = """
from datasets import Dataset, DatasetDict
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from trl import SFTTrainer

class MyAdamW(AdamW):
    pass

class MyTrainer(SFTTrainer):
    def training_step(self, *args, **kwargs):
        print("MY STEP")
        return super().training_step(*args, **kwargs)

def my_schedule(optimizer, num_training_steps: int, floor: float = 0.5) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: max(floor, 1 - step / num_training_steps))

def my_rows(words: int = 3) -> DatasetDict:
    rows = Dataset.from_list([{"prompt": f"say {n}", "completion": f" {n}"} for n in range(words)])
    return DatasetDict(train=rows, eval=rows)
"""
OWN = """
lora:
  optimizer:
    _target_: parts.MyAdamW
  scheduler:
    _target_: parts.my_schedule
    floor: 0.25
  task:
    _target_: parts.MyTrainer
  loraplus:
    extra_rules:
      first:
        pattern: layers\\.0\\.
        lr_mult: 0.5
        ratio: 2
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    _copy_checkout(source)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True)
    wheel = next(folder.glob("*.whl"))
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    return site


def _copy_checkout(target: Path) -> None:
    import shutil

    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "outputs")
    for name in ("loraplus_hydra", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / name, target / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)


# Runs programs of other folders, each in a forked process, because each import of these libraries takes many seconds.
FORKS = """
import json, os, runpy, sys
import bitsandbytes, datasets, matplotlib.figure, peft, torch, transformers, trl

assert not any(name.startswith("loraplus_hydra") for name in sys.modules)
print("ready", flush=True)
for line in sys.stdin:
    folder, log, first, *words = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(handle, stream)
            os.chdir(folder)
            sys.path[0] = folder
            if first == "-m":
                sys.argv = words
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            else:
                sys.argv = [first, *words]
                runpy.run_path(first, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def run_wheel(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """A function that runs a program or module in a folder, with the wheel's content, and returns what it prints."""
    log = tmp_path_factory.mktemp("logs") / "log"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, cwd=installed.parent, env=environment, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None

        def run(folder: Path, *words: str) -> str:
            log.unlink(missing_ok=True)
            print(json.dumps([str(folder), str(log), *words]), file=process.stdin, flush=True)
            status = process.stdout.readline().strip() if process.stdout else ""
            output = log.read_text()
            assert status == "0", output
            return output

        yield run
        process.stdin.close()


def run_in(folder: Path, site: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    wheel = next(installed.parent.glob("*.whl"))
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in ((ROOT / "conf", "loraplus_hydra/conf"), (ROOT / "loraplus_hydra", "loraplus_hydra")):
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
                assert f"{prefix}/{path.relative_to(folder).as_posix()}" in packed


def test_wheel_has_the_sweeper_that_hydra_looks_for(installed: Path, tmp_path: Path) -> None:
    code = "from hydra.core.plugins import Plugins; print(*Plugins.instance().class_name_to_class)"
    assert "hydra_plugins.loraplus_halving.HalvingSweeper" in run_in(tmp_path, installed, "-c", code)
    assert not (installed / "hydra_plugins" / "__init__.py").exists()  # other distributions have plugins there, too


def test_wheel_composes_the_same_config_as_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run_in(tmp_path, installed, "-c", "import loraplus_hydra; print(loraplus_hydra.__file__)")
    assert str(installed) in where
    from_wheel = run_in(tmp_path, installed, "-m", "loraplus_hydra", "--cfg", "job")
    from_checkout = run_in(tmp_path, ROOT, "-m", "loraplus_hydra", "--cfg", "job")
    assert from_wheel == from_checkout
    assert "ratio: 8.0" in from_wheel


def test_second_repository_composes_a_run_with_its_own_override(
    run_wheel: Callable[..., str], tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    (tmp_path / "main.py").write_text(PROGRAM)
    overrides = [f"lora.model.path={tiny_model}", f"lora.data.train={rows}", "lora.optimizer.lr=1e-3"]
    output = run_wheel(tmp_path, "main.py", *overrides)
    assert "METRIC" in output
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    assert result["status"] == "ok"
    assert result["steps"] == 2
    groups = json.loads((tmp_path / "results" / "param_groups.json").read_text())
    assert {row["group"]: row["lr"] for row in groups} == pytest.approx({"groupA": 1e-3, "groupB": 4e-3})


def test_second_repository_names_parts_of_its_own(
    run_wheel: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "conf" / "data").mkdir(parents=True)
    config = CONFIG.replace("/data@lora.data: jsonl", "/data@lora.data: mine").replace(
        "- /run@lora", "- /run@lora\n  - own"
    )
    (tmp_path / "conf" / "config.yaml").write_text(config)
    (tmp_path / "conf" / "own.yaml").write_text("# @package _global_\n" + OWN)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(
        "_target_: parts.my_rows\nwords: 6\nprompt_column: prompt\ncompletion_column: completion\n"
    )
    (tmp_path / "main.py").write_text(PROGRAM)
    (tmp_path / "parts.py").write_text(PARTS)
    output = run_wheel(tmp_path, "main.py", f"lora.model.path={tiny_model}")
    assert output.count("MY STEP") == 2
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("ok", 2)
    groups = json.loads((tmp_path / "results" / "param_groups.json").read_text())
    lr = next(row["lr"] for row in groups if row["group"] == "groupA")
    rates = {row["group"]: row["lr"] for row in groups}
    assert rates == pytest.approx({"groupA": lr, "groupB": 4 * lr, "first": lr})
    assert {row["group"] for row in groups if "layers.0." in row["name"]} == {"first"}
    stored = (tmp_path / "results" / "config.yaml").read_text()
    assert all(part in stored for part in ("parts.MyAdamW", "parts.my_schedule", "parts.MyTrainer", "parts.my_rows"))


def test_wheel_runs_from_the_command_line(run_wheel: Callable[..., str], tiny_run: list[str], tmp_path: Path) -> None:
    run_wheel(tmp_path, "-m", "loraplus_hydra", *tiny_run, "hydra.run.dir=run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "ok"
