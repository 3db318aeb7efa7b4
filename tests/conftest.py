"""What many tests stand on: a tiny model and rows on disk, the command line in this process, composed configs."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import gc
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.support.tiny", "tests.support.words"]

# On a loaded machine examples are slow, which is no error of the code. Each run has the same examples, so that a change
# breaks a test and chance doesn't; `--hypothesis-profile=random` draws others.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("random"), derandomize=True)
settings.load_profile("repeatable")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the machine
# Rows and tokens that are kept between runs are kept out of the user's own cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="loraplus_hydra_")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless the tests that need one are asked for: the other tests expect a CPU's numbers and forks."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def _imports_not_collected() -> None:
    """Keep all imported objects out of garbage collections, each of which takes as long as a tiny run otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_earlier_evaluation() -> None:
    """Let each test's first run evaluate before training, whatever another test has evaluated in this process."""
    module = sys.modules.get("loraplus_hydra.training.hf_trainer.start_evaluation")
    if module is not None:
        module._known.clear()


@pytest.fixture(scope="session", autouse=True)
def _no_figures() -> Iterator[None]:
    """Let runs of this process draw no train.png, which takes a third of a tiny run; those of other processes do."""
    from loraplus_hydra.runs import figure

    with pytest.MonkeyPatch.context() as patch:
        # The job's module may be imported already, or be imported later by a test.
        for module in (figure, sys.modules.get("loraplus_hydra.runs.job", figure)):
            patch.setattr(module, "draw_training", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_traces() -> Iterator[None]:
    """Leave out the estimate of activations, which takes as long as a tiny run. test_step_memory.py makes it."""
    from loraplus_hydra.runs import inspection
    from loraplus_hydra.training.hf_trainer.step_memory import StepMemory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "step_memory", lambda *_: StepMemory(1, None))
        yield


@pytest.fixture(scope="session", autouse=True)
def _configs_merged_once() -> Iterator[None]:
    """Keep what Hydra makes of the package's YAML files, for each choice of options; it takes most of a command's time.

    Overrides of values are applied anew each time. A configuration with files from elsewhere is made anew as well.
    """
    from hydra._internal import config_loader_impl, config_repository, defaults_list
    from hydra.core.config_store import ConfigStore

    from loraplus_hydra.config.locations import config_folder

    listed: dict[Any, Any] = {}
    merged: dict[Any, bytes] = {}
    list_defaults = defaults_list.create_defaults_list
    merge = config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list

    def sources(repo: Any) -> tuple[str, ...] | None:
        """Return where the files are, and the plugins' names; None if a test may change the files."""
        places = tuple(f"{source.scheme()}://{source.path}" for source in repo.get_sources())
        ours = (f"file://{config_folder()}", "pkg://hydra.conf", "structured://")
        if not all(place.startswith(ours) for place in places):
            return None
        plugins = ConfigStore.instance().repo.get("hydra", {})  # a test may take a plugin away
        return (*places, *(f"{group}/{name}" for group in ("launcher", "sweeper") for name in plugins.get(group, ())))

    def create_defaults_list(repo: Any, config_name: Any, overrides_list: Any, **settings: Any) -> Any:
        overrides = defaults_list.Overrides(repo, overrides_list)
        of_values = {id(override) for override in overrides.config_overrides}
        choices = tuple(each.input_line for each in overrides_list if id(each) not in of_values)
        key = (sources(repo), config_name, choices, *sorted(settings.items()))
        if key[0] is None:
            return list_defaults(repo, config_name, overrides_list, **settings)
        if key not in listed:
            listed[key] = list_defaults(repo, config_name, overrides_list, **settings)
        return dataclasses.replace(listed[key], config_overrides=overrides.config_overrides)

    def compose(loader: Any, defaults: Any, repo: Any) -> Any:
        key = (sources(repo), repr(defaults))
        if key[0] is None:
            return merge(loader, defaults, repo)
        if key not in merged:
            merged[key] = pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(merged[key])

    read: dict[Any, bytes] = {}
    load = config_repository.ConfigRepository.load_config

    def load_config(repo: Any, config_path: str) -> Any:
        key = (sources(repo), config_path)
        if key[0] is None:
            return load(repo, config_path)
        if key not in read:
            read[key] = pickle.dumps(load(repo, config_path))
        return pickle.loads(read[key])

    def with_sources_of(repo: Any, delegate: Any) -> None:
        """Stand for `CachingConfigRepository.__init__`, which copies all schemas only to keep a list of sources."""
        repo.delegate, repo.cache = copy.copy(delegate), {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_repository.ConfigRepository, "load_config", load_config)
        patch.setattr(config_repository.CachingConfigRepository, "__init__", with_sources_of)
        patch.setattr(config_loader_impl, "create_defaults_list", create_defaults_list)
        patch.setattr(config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list", compose)
        yield


@pytest.fixture(scope="session", autouse=True)
def _composed_once() -> Iterator[None]:
    """Skip the composition in which Hydra only reads its mode, if no override can set a mode."""
    from hydra._internal.hydra import Hydra

    asked = Hydra.get_mode
    setting = re.compile(r"[+~]*(hydra(?!\.(run|sweep)\.dir=)|hparams_search|experiment)")

    def get_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        if any(setting.match(override) for override in overrides):
            return asked(hydra, config_name, overrides)
        return None  # Hydra's answer for a config without a mode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", get_mode)
        yield


@pytest.fixture(scope="session", autouse=True)
def _configs_copied_fast() -> Iterator[None]:
    """Copy what OmegaConf notes of each value field by field; `deepcopy` takes most of a copy for it."""
    from omegaconf.base import Metadata

    def copied(noted: Metadata, memo: dict[int, Any]) -> Metadata:
        new = copy.copy(noted)
        new.flags = None if noted.flags is None else dict(noted.flags)
        new.resolver_cache = copy.deepcopy(noted.resolver_cache, memo)
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metadata, "__deepcopy__", copied, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _cards_compiled_once() -> Iterator[None]:
    """Keep the compiled template of PEFT's model card, which is filled in for each checkpoint."""
    from jinja2 import Environment

    compiled: dict[Any, Any] = {}
    compile_template = Environment.compile

    def compile_once(environment: Environment, source: Any, *more: Any, **settings: Any) -> Any:
        if not environment.shared or not isinstance(source, str):  # shared: that of `jinja2.Template`
            return compile_template(environment, source, *more, **settings)
        key = (environment, source, more, *sorted(settings.items()))
        if key not in compiled:
            compiled[key] = compile_template(environment, source, *more, **settings)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", compile_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Leave out `fsync`, which matters only when the power fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights and a byte-level tokenizer of 300 tokens, no template."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["say one two three four"] * 4, vocab_size=300, special_tokens=["<pad>", "<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of forty prompts and completions."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ("one", "two", "three", "four")
    lines = [{"prompt": f"say {words[i % 4]} {i}", "completion": f" {words[i % 4]}"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path, rows: Path) -> list[str]:
    """Overrides of a run that takes a second: the tiny model on the rows, four steps."""
    return [
        "model=hub",
        f"model.path={tiny_model}",
        "data=jsonl",
        f"data.train={rows}",
        "trainer.max_steps=4",
        "trainer.per_device_train_batch_size=4",
        "trainer.logging_steps=1",
        "task.samples=1",
        "task.sample_tokens=4",
        "optimizer.lr=1e-3",
    ]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny checkpoint of an architecture, made once."""
    from tests.support.architectures import checkpoint

    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = checkpoint(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


@pytest.fixture
def compose() -> Callable[..., Any]:
    """A `run` config composed from overrides, without Hydra's own node."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.config.locations import config_folder
    from loraplus_hydra.config.schema import register, run_of

    def composed(*overrides: str) -> Any:
        register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            return run_of(hydra_compose("config", overrides=list(overrides)))

    return composed


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """The command line called in this process, from an empty folder: `cli("check", "optimizer.lr=0")`."""
    import signal

    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    for name in ("HYDRA_FULL_ERROR", "LORAPLUS_HYDRA_TRACEBACK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)

    def called(*arguments: str) -> Finished:
        from loraplus_hydra.cli.main import main

        GlobalHydra.instance().clear()
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr("sys.argv", ["loraplus-hydra", *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, handler)
            _close_log_files()
        captured = capfd.readouterr()
        return Finished(status, captured.out, captured.err)

    return called


@pytest.fixture
def stopped(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Train `overrides` in `folder` and stop as Ctrl-C does in step `at`."""
    import os
    import signal

    from loraplus_hydra import run
    from loraplus_hydra.training.hf_trainer.callbacks import StopAtStep

    def train(folder: Path, *overrides: str, at: int) -> None:
        def begin(self: StopAtStep, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at - 1:
                os.kill(os.getpid(), signal.SIGINT)

        # A shell's background jobs, in which the tests may run, ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(StopAtStep, "on_step_begin", begin)
                with pytest.raises(KeyboardInterrupt):
                    run(compose(*overrides), folder)
        finally:
            signal.signal(signal.SIGINT, before)

    return train


def _close_log_files() -> None:
    """Take away the log handlers that Hydra set up: their files and streams end with the command."""
    import logging

    for name in ("", "loraplus_hydra"):
        logger = logging.getLogger(name)
        logger.propagate = True
        for handler in [one for one in logger.handlers if type(one) in (logging.FileHandler, logging.StreamHandler)]:
            logger.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                with suppress(OSError):  # a full disk; logging.shutdown ignores it, too
                    handler.close()
