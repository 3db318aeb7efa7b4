"""The command line: what answers at once, what it imports, and how a run ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import Finished

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "matplotlib", "rich")


def imported_by(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str, set[str]]:
    """Exit status, output and imported top-level modules of a command line in a process of its own."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('IMPORTED', *sorted({n.split('.')[0] for n in sys.modules}), file=sys.stderr))\n"
        "from loraplus_hydra.cli.main import main\n"
        f"sys.argv = ['loraplus-hydra', *{list(arguments)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    told, _, modules = done.stderr.rpartition("IMPORTED")
    return done.returncode, done.stdout + told, set(modules.split())


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "== Commands =="),
        (["--cfg", "job"], 0, "_target_: torch.optim.AdamW"),
        (["check", "--cfg", "job", "loraplus.ratio=3"], 0, "ratio: 3"),
        (["optimizr=adamw"], 1, "did you mean 'optimizer'"),
        (["optimizer=adamx"], 1, "no option 'adamx'"),
        (["trainer.max_stepz=3"], 1, "did you mean 'max_steps'"),
        (["check", "seed=x"], 1, "'x' is not a whole number"),
    ],
)
def test_answers_without_heavy_imports(arguments: list[str], status: int, said: str) -> None:
    returned, output, modules = imported_by(*arguments)
    assert returned == status
    assert said in output
    assert "hydra" in modules
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("loraplus-hydra ch", "check"),
        ("loraplus-hydra optimizer=adamw8", "optimizer=adamw8bit"),
        ("loraplus-hydra check optimizer=adamw8", "optimizer=adamw8bit"),
        ("loraplus-hydra check loraplus.rat", "loraplus.ratio="),
    ],
)
def test_completes_in_the_shell_behind_a_first_word_too(line: str, offered: str) -> None:
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    status, output, modules = imported_by("-sc", "query=bash", environment=environment)
    assert status == 0
    assert offered in output.split()
    assert modules.isdisjoint(HEAVY)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, loraplus_hydra; assert loraplus_hydra.__version__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()}.isdisjoint({*HEAVY, "hydra", "omegaconf"})


def test_what_the_package_offers_is_there() -> None:
    import loraplus_hydra

    for name in loraplus_hydra.__all__:
        assert getattr(loraplus_hydra, name) is not None
    with pytest.raises(AttributeError):
        _ = loraplus_hydra.nothing_of_the_kind


def test_check_says_that_a_good_config_is_right(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    finished = cli("check", *tiny_run)
    assert finished.status == 0
    assert "The config has no errors" in finished.out
    assert list(tmp_path.iterdir()) == []


def test_commands_refuse_a_sweep(cli: Callable[..., Finished]) -> None:
    finished = cli("check", "-m", "loraplus.ratio=1,2")
    assert finished.status == 1
    assert "not a sweep" in finished.err


def test_traceback_is_shown_on_request(
    cli: Callable[..., Finished], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = cli(*tiny_run, "loraplus=foo")
    assert "Traceback" not in quiet.err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    from hydra.errors import HydraException

    monkeypatch.setattr("sys.argv", ["loraplus-hydra", *tiny_run, "loraplus=foo"])
    from loraplus_hydra.cli.main import main

    with pytest.raises(HydraException):
        main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cfgg", "job"], "--cfgg: there is no such flag (did you mean '--cfg'?)"),
        (["inspect", "--tensor"], "--tensor: there is no such flag (did you mean '--tensors'?)"),
        (["--cfg", "jobs"], "--cfg/-c: invalid choice: 'jobs'"),
        (["seed=1", "--config-dir"], "--config-dir/-cd: expected one argument"),
        (["-x", "--json", "seed=1"], "-x: there is no such flag"),
        (["--config-dir", "nowhere"], "--config-dir: there is no folder 'nowhere'"),
        (["--experimental-rerun", "config.pickle"], "reads a pickle"),
        (["-sc", "install=csh"], "--shell-completion: has no effect without install"),
        (["--package", "a..b", "--cfg", "job", "seeed=1"], "seeed: there is no such key"),
    ],
)
def test_wrong_flag_is_a_listed_error(words: list[str], said: str, cli: Callable[..., Finished]) -> None:
    finished = cli(*words)
    assert finished.status == 1
    assert re.match(r"\d+ errors?:", finished.err)
    assert said in finished.err


@pytest.mark.parametrize(("flag", "place"), [("--config-name", "nowhere"), ("--config-path", "/nowhere")])
def test_config_that_is_not_there_is_told(flag: str, place: str, cli: Callable[..., Finished]) -> None:
    finished = cli(flag, place)
    assert finished.status == 1
    assert finished.err.startswith("Error: ")
    assert "nowhere" in finished.err
    assert "HYDRA_FULL_ERROR" not in finished.err


def test_flags_may_stand_between_overrides(cli: Callable[..., Finished]) -> None:
    finished = cli("check", "seed=5", "--cfg", "job", "loraplus.ratio=3", "--package", "loraplus", "optimizer.lr=1e-3")
    assert finished.status == 0
    assert "ratio: 3" in finished.out


@pytest.mark.parametrize("words", [["--info", "seed=1"], ["seed=1", "--info"], ["--info", "searchpath", "seed=1"]])
def test_info_is_shown_with_overrides_too(words: list[str], cli: Callable[..., Finished]) -> None:
    finished = cli(*words)
    assert finished.status == 0, finished.err
    assert "Config search path" in finished.out


def test_help_lists_every_command() -> None:
    from loraplus_hydra.cli.commands import COMMANDS

    _, output, _ = imported_by("--help")
    assert list(COMMANDS) == [
        "chat",
        "check",
        "evaluate",
        "export",
        "inspect",
        "predict",
        "preview",
        "report",
        "resume",
        "train",
        "tune",
    ]
    for name, command in COMMANDS.items():
        assert re.search(rf"\n  {name} .*{re.escape(command.summary)}\n", output)


@given(st.text(st.sampled_from("ab \\'\"${}[],=:~\n"), max_size=12))
@example("it's {odd}: [1, 2]")
@example("a backslash at the end of a line\\\n")
@example("costs ${x} or \\${x}")
def test_text_to_predict_on_is_taken_as_it_is_typed(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from loraplus_hydra.cli.arguments import hydra_arguments

    if text[:1] in ("'", '"'):  # quoted by the user
        return
    overrides = [word for word in hydra_arguments("predict", ["RUN", f"text={text}"]) if not word.startswith("--")]
    parsed = {one.key_or_group: one.value() for one in map(OverridesParser.create().parse_override, overrides)}
    config = OmegaConf.create(parsed)
    assert (config.text, config.run) == (text, "RUN")


@pytest.mark.parametrize("typed", ["true", "1e3", "1_000", "2024_01_05", "a,b", "[a]"])
@pytest.mark.parametrize(
    ("command", "key"),
    [
        *(("predict", key) for key in ("run", "text", "text_pair", "file", "out")),
        *(("evaluate", key) for key in ("run", "out", "harness_tasks", "forgetting")),
        *(("export", key) for key in ("run", "to")),
        *(("chat", "system"), ("resume", "run"), ("report", "folder")),
    ],
)
def test_texts_and_paths_are_taken_as_they_are_typed(command: str, key: str, typed: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from loraplus_hydra.cli.arguments import hydra_arguments

    (word,) = [word for word in hydra_arguments(command, [f"{key}={typed}"]) if word.startswith(f"{key}=")]
    assert OverridesParser.create().parse_override(word).value() == typed
