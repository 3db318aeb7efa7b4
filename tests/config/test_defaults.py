"""What differs from a run without overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from loraplus_hydra.config.defaults import changed_part, default_run
from loraplus_hydra.config.plain import flat


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], set()),
        (["loraplus.ratio=16"], {"loraplus.ratio"}),  # the rules' ratios follow it
        (["seed=3", "trainer.max_steps=7"], {"seed", "trainer.max_steps"}),
        (["adapter.r=8"], set()),  # the default
        (["optimizer=lion"], {"optimizer._target_", "optimizer.betas", "optimizer.lr"}),
        (["adapter.target_modules=[q_proj]"], {"adapter.target_modules"}),
    ],
)
def test_changed_are_the_keys_that_overrides_gave_another_value(
    compose: Callable[..., Any], overrides: list[str], keys: set[str]
) -> None:
    assert flat(changed_part(compose(*overrides))).keys() == keys


def test_stored_config_has_no_changes_but_those_of_its_run(compose: Callable[..., Any]) -> None:
    stored = compose("seed=3")
    OmegaConf.resolve(stored)
    assert changed_part(stored) == {"seed": 3}


def test_app_that_composes_goes_on_after_the_defaults_were_read() -> None:
    default_run.cache_clear()
    with initialize(version_base="1.3", config_path=None):
        app = GlobalHydra.instance().hydra
        assert app is not None
        default_run()
        assert GlobalHydra.instance().hydra is app
