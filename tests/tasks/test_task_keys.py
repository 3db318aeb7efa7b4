"""A task's own keys: parameters of its `examples` function, checked against its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplus_hydra.config.schema import TaskConfig
from loraplus_hydra.config.targets import locate
from loraplus_hydra.tasks.examples import BASE
from tests.conftest import Finished

COMMON = {field.name for field in fields(TaskConfig)}
CONF = Path(__file__).parents[2] / "conf" / "task"

OWN_TASK = """
from __future__ import annotations
from typing import TYPE_CHECKING
from loraplus_hydra.errors import Problem
from loraplus_hydra.tasks import sft
from loraplus_hydra.tasks.examples import Examples
if TYPE_CHECKING:
    from datasets import DatasetDict

def examples(rows: DatasetDict, tok, task, data, *, width: int, mode: str | None = None) -> Examples:
    print(f"width {width}, mode {mode}")
    return sft.examples(rows, tok, task, data, chat=False)

def config_problems(config) -> list[Problem]:
    return [Problem("task.width", "is unlucky", "add 1")] if config["task"]["width"] == 13 else []
"""


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return overrides of a run whose task is a function in a user's module."""
    folder = tmp_path_factory.mktemp("own")
    name = f"task_of_{folder.name}"
    (folder / f"{name}.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(str(folder))
    return [*tiny_run, "task=text", f"task.examples={name}.examples", "~task.block_size"]


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_an_options_own_keys_are_all_parameters_of_its_function(file: Path) -> None:
    option = yaml.safe_load(file.read_text())
    taken = list(inspect.signature(locate(option["examples"])).parameters)
    assert {*option} - COMMON == {*taken[4:]} - {BASE}


def test_keys_reach_a_users_function_by_name(own: list[str], cli: Callable[..., Finished]) -> None:
    checked = cli("check", *own, "+task.width=3", "+task.mode=wide")
    assert checked.status == 0
    assert "width 3, mode wide" in checked.out


MISTAKES: dict[str, tuple[list[str], str]] = {
    "key that is needed": ([], "task.width: examples needs this argument"),
    "wrong type": (["+task.width=wide"], "task.width: 'wide' is not a whole number"),
    "unknown key": (
        ["+task.width=3", "+task.chat=true"],
        "task.chat: examples takes no argument 'chat'; it takes width, mode",
    ),
    "mistyped key": (["+task.width=3", "+task.mod=x"], "task.mod: examples takes no argument 'mod' (did you mean"),
    "mistyped key of every task": (["+task.width=3", "+task.sampels=1"], "(did you mean 'samples'?)"),
    "what the run passes": (["+task.width=3", "+task.rows=1"], "task.rows: is passed by the run itself"),
    "rule of the module": (["+task.width=13"], "task.width: is unlucky; add 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_keys_that_the_function_does_not_take_are_listed(
    name: str, own: list[str], cli: Callable[..., Finished]
) -> None:
    overrides, message = MISTAKES[name]
    checked = cli("check", *own, *overrides)
    assert checked.status == 1
    assert "1 error:" in checked.err
    assert message in checked.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.samples=many"], "task.samples: 'many' is not a whole number"),
        (["task.greater_is_better=2"], "task.greater_is_better: '2' is not true or false"),
        (["~task.metric"], "task.metric: is not set"),
        (["task.examples=null"], "task.examples: 'None' is not text"),
        (["task.chat=perhaps"], "task.chat: 'perhaps' is not true or false or null"),
        (["task=text", "task.block_size=1"], "task.block_size: 1 is out of range"),
        (["task=text", "task.block_size=null"], "task.block_size: null is not a whole number"),
        (["task=classification", "task.max_length=0"], "task.max_length: 0 is out of range"),
    ],
)
def test_values_of_a_tasks_keys_are_checked(overrides: list[str], message: str, cli: Callable[..., Finished]) -> None:
    checked = cli("check", *overrides)
    assert checked.status == 1
    assert message in checked.err


def test_keys_of_every_task_have_defaults(compose: Callable[..., Any]) -> None:
    task = compose("task=classification").task
    assert (task.samples, task.sample_tokens) == (TaskConfig().samples, TaskConfig().sample_tokens)
