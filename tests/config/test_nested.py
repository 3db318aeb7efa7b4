"""A run's config that another repository has composed below a key of its own config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from loraplus_hydra.check.keys import unknown_keys
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.config.schema import register, run_of
from loraplus_hydra.errors import ConfigErrors

ROOT = """
defaults:
  - /run@lora
  - _self_
hydra:
  searchpath: [pkg://loraplus_hydra.conf]
model: {lr: 3e-3}
seed: 7
steps: 2
size: 4
names: [q_proj, v_proj]
rates: {first: 1e-3, second: 2e-3}
which: second
lora:
  model: {lr: 5e-5}
"""


@pytest.fixture
def nested(tmp_path: Path) -> Any:
    """Compose the repository's config and return its node `lora`."""

    def composed(*overrides: str) -> Any:
        (tmp_path / "config.yaml").write_text(ROOT)
        register()
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
            return compose("config", overrides=list(overrides)).lora

    return composed


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("lora.optimizer.lr=${model.lr}", 3e-3),
        ("lora.optimizer.lr=${...model.lr}", 3e-3),
        ("lora.optimizer.lr='${rates.${which}}'", 2e-3),
        ("lora.optimizer.lr=${oc.select:model.lr}", 3e-3),
        ("lora.model.tokenizer='${oc.env:NOT_SET,${which}}'", "second"),
        ("lora.optimizer.lr=${lora.model.lr}", 5e-5),
        ("lora.seed=${seed}", 7),
        ("lora.seed=${..seed}", 7),
        ("lora.trainer.max_steps=${steps}", 2),
        ("lora.adapter.target_modules=${names}", ["q_proj", "v_proj"]),
        ("lora.adapter.target_modules=['${names[0]}',o_proj]", ["q_proj", "o_proj"]),
        ("lora.model.tokenizer=rate-${model.lr}", "rate-0.003"),
    ],
)
def test_interpolation_has_the_value_that_the_whole_config_gives_it(override: str, value: Any, nested: Any) -> None:
    config, key = nested(override), override.split("=")[0].removeprefix("lora.")
    run = run_of(config)
    assert OmegaConf.select(run, key) == OmegaConf.select(config, key) == value
    stored = yaml.safe_load(OmegaConf.to_yaml(run, resolve=True))
    assert stored["model"]["lr"] == 5e-5


def test_interpolations_within_the_run_stay(nested: Any) -> None:
    run = run_of(nested("lora.trainer.max_steps=${steps}", "lora.model.lr=1e-3"))
    assert OmegaConf.to_container(run.optimizer, resolve=False)["lr"] == "${..model.lr}"  # type: ignore[index,call-overload]
    run.model.lr = 2e-3
    assert run.optimizer.lr == 2e-3
    assert unknown_keys(plain_of(run), run) == []


def test_the_composed_config_is_not_changed(nested: Any) -> None:
    config = nested("lora.seed=${seed}")
    run_of(config)
    assert OmegaConf.is_interpolation(config, "seed")


def test_reference_that_only_the_run_would_have_is_refused(nested: Any) -> None:
    with pytest.raises(ConfigErrors, match=r"trainer\.max_steps.*data\.max_samples"):
        run_of(nested("lora.trainer.max_steps=${data.max_samples}"))
