"""Patterns and templates of untrusted folders run bounded in time, and stored sets have one order."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from peft import LoraConfig, get_peft_model
from torch import nn

from loraplus_hydra.errors import UserError
from loraplus_hydra.io.time_limit import TooSlowError, time_limit
from loraplus_hydra.models import patterns
from loraplus_hydra.models.adapter_files import save_factors
from loraplus_hydra.tasks import chat

ENDLESS = "(([a-z._0-9]+)+)+!"


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_projection_with_a_name_long_enough = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_endless_pattern_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    value: Any = {ENDLESS: 4} if "pattern" in field else ENDLESS
    began = time.process_time()
    with pytest.raises(UserError, match=f"the adapter's {field} can't be matched"):
        patterns.refuse_slow_patterns(LoraConfig(**{field: value}), _Model())
    assert time.process_time() - began < 5
    patterns.refuse_slow_patterns(LoraConfig(target_modules="b", rank_pattern={"^b": 4}), _Model())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ messages.nope.x }}", "nope"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes longer than"),
    ],
)
def test_template_that_fails_or_never_ends_is_an_error(
    template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply_chat_template(messages: Any, **_: Any) -> str:
        return ImmutableSandboxedEnvironment().from_string(template).render(messages=messages)

    monkeypatch.setattr(chat, "_SECONDS", 0.2)
    tokenizer: Any = SimpleNamespace(apply_chat_template=apply_chat_template)
    with pytest.raises(UserError, match=f"the chat template fails: .*{reason}"):
        chat.apply_template(tokenizer, [{"role": "user", "content": "hi"}])


def test_limit_ends_with_its_block() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TooSlowError), time_limit(0.05):
        time.sleep(1)


def test_sets_are_stored_sorted(tmp_path: Path) -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(to_dict=dict)
            for name in "qwertyuiop":
                setattr(self, name, nn.Linear(2, 2))

        def forward(self, x: Any) -> Any:
            return x

    save_factors(get_peft_model(Base(), LoraConfig(target_modules=list("qwertyuiop"))), tmp_path)  # type: ignore[arg-type]
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == sorted("qwertyuiop")
