"""optimizer.lr=auto: a published rate for the model, or the published rule, rescaled to the run's alpha and ratio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraplus_hydra.config.locations import options_of
from loraplus_hydra.errors import UserError
from loraplus_hydra.models.published_rate import auto_rate, register

# By hand: 5e-4 x (2000 / hidden size) ^ P at alpha 32, with P = 0.781 for Llama and 0.0775 for Qwen.
BY_RULE = {
    "gemma_2b": 5e-4 * (2000 / 2048) ** 0.781,
    "gpt2": 5e-4 * (2000 / 768) ** 0.781,
    "llama2_7b": 5e-4 * (2000 / 4096) ** 0.781,
    "llama3_2_1b": 5e-4 * (2000 / 2048) ** 0.781,
    "llama3_70b": 5e-4 * (2000 / 8192) ** 0.781,
    "llama3_8b": 5e-4 * (2000 / 4096) ** 0.781,
    "mistral_7b": 5e-4 * (2000 / 4096) ** 0.781,
    "llama3_2_3b": 5e-4 * (2000 / 3072) ** 0.781,
    "qwen2_5_0_5b": 5e-4 * (2000 / 896) ** 0.0775,
    "qwen2_5_1_5b": 5e-4 * (2000 / 1536) ** 0.0775,
    "smollm2_135m": 5e-4 * (2000 / 576) ** 0.781,
    "smollm2_360m": 5e-4 * (2000 / 960) ** 0.781,
}
GUESSED = {"gemma_2b", "gpt2", "mistral_7b"}
# (rate of lora_B, alpha) of each source
PUBLISHED = {"embedded": (8e-3, 16), "gpt2_medium": (2e-4, 32), "minilm": (5e-3, 16), "roberta_base": (5e-4, 8)}
UNKNOWN = {"bert_base", "hub"}
CLASSIFIER = ("task=classification", "data=csv", "data.train=rows.csv")
ENCODERS = ("bert_base", "minilm", "roberta_base")


@pytest.mark.parametrize("model", options_of("model"))
def test_each_named_model_has_a_rate_with_its_source(model: str, compose: Callable[..., Any]) -> None:
    if model in UNKNOWN - {"bert_base"}:
        return
    task = CLASSIFIER if model in ENCODERS else ()
    config = compose(f"model={model}", *task, "loraplus.ratio=4", "adapter.lora_alpha=64")
    if model in UNKNOWN:
        with pytest.raises(UserError, match="give a number"):
            auto_rate(config)
        return
    eta_b, alpha = PUBLISHED.get(model) or (BY_RULE[model], 32)

    rate = auto_rate(config)

    assert rate.lr * 4 == pytest.approx(eta_b * alpha / 64, rel=5e-3)  # rounded to three digits
    assert ("rule" in rate.source) == (model in BY_RULE)
    assert ("a guess" in rate.source) == (model in GUESSED)


def test_rates_that_are_set_directly_have_no_published_one(compose: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"loraplus\.lr_B is a rate of its own"):
        auto_rate(compose("loraplus=absolute"))


@pytest.mark.parametrize(
    ("override", "factor"),
    [
        ("adapter=rslora", 1 / 8**0.5),  # alpha / sqrt(8) instead of alpha / 8
        ("adapter=dora", 1),
        ("adapter.r=64", 1),
        ("adapter=pissa", 1 / 10),
        ("adapter.init_lora_weights=pissa_niter_4", 1 / 10),
        ("adapter=olora", 1 / 18),
        ("loraplus=none", 8),
        ("optimizer=adamw8bit", 1),
    ],
)
def test_start_scale_and_ratio_change_the_rate(override: str, factor: float, compose: Callable[..., Any]) -> None:
    model = "model=llama3_8b"
    usual = auto_rate(compose(model)).lr
    assert auto_rate(compose(model, override)).lr == pytest.approx(usual * factor, rel=1e-2)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("optimizer=lion", "published rates are those of Adam, not of Lion"),
        ("optimizer=sgd", "published rates are those of Adam, not of SGD"),
        ("adapter=vera", "published rates are those of LoRA, not of VeraConfig"),
        ("adapter=lora_a_zero", "nothing is published for adapter.init_lora_weights=a_zero"),
        ("+loraplus.extra_rules.b={role: lora_B, lr: 1e-3}", "loraplus.extra_rules.b.lr is lora_B's own rate"),
        ("adapter.init_lora_weights=orthogonal", "nothing is published for adapter.init_lora_weights=orthogonal"),
    ],
)
def test_a_rate_that_nobody_published_is_a_listed_error(
    override: str, what: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    done = cli("check", "optimizer.lr=auto", override)
    assert done.status == 1
    assert done.err.startswith("1 error:")
    assert f"optimizer.lr: 'auto' can't be resolved: {what}" in done.err
    assert "; give a number" in done.err


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("adapter=existing", "published rates are those of LoRA, not of an adapter that is trained on"),
        ("adapter.lora_alpha=0", "adapter.lora_alpha=0 is not a number above 0"),
        ("task=dpo", "published rates are those of training on answers, not of DPOTrainer"),
        ("experiment=orpo", "published rates are those of training on answers, not of ORPOTrainer"),
        ("experiment=kto", "published rates are those of training on answers, not of KTOTrainer"),
    ],
)
def test_no_rate_is_taken_from_another_kind_of_training(override: str, what: str, compose: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=what):
        auto_rate(compose(override))


def test_a_rate_is_not_handed_to_another_model_or_task(compose: Callable[..., Any], tiny_model: Path) -> None:
    of_rule = auto_rate(compose("model=hub", f"model.path={tiny_model}"))
    assert "rule" in of_rule.source
    assert auto_rate(compose("model=embedded", f"model.path={tiny_model}")) == of_rule
    with pytest.raises(UserError, match="no rate is published for"):
        auto_rate(compose("model=gpt2_medium", *CLASSIFIER))


def test_the_rule_that_decides_lora_B_gives_its_multiple_of_the_rate(compose: Callable[..., Any]) -> None:
    register()
    model = "model=llama3_8b"
    usual = auto_rate(compose(model, "loraplus.ratio=8")).lr
    for override, factor in (
        ("loraplus.rules.groupB.ratio=4", 2),
        ("+loraplus.rules.groupB.lr_mult=2", 1 / 2),
        ("+loraplus.extra_rules.b={role: lora_B, ratio: 2}", 4),
        ("+loraplus.extra_rules.q={role: lora_A, lr: 1e-3}", 1),
        ("+loraplus.extra_rules.a={role: lora_A, lr: '${optimizer.lr}'}", 1),  # not known yet
        ("loraplus=peft", 1),
        ("loraplus=roles", 1),
    ):
        config = compose(model, override, "optimizer.lr=auto")
        assert config.optimizer.lr == pytest.approx(usual * factor, rel=1e-2), override


def test_an_adapter_without_alpha_and_rank_has_pefts(compose: Callable[..., Any]) -> None:
    model = "model=llama3_8b"
    config = compose(model, "~adapter.lora_alpha", "~adapter.r")
    assert auto_rate(config) == auto_rate(compose(model, "adapter.lora_alpha=8", "adapter.r=8"))


def test_a_model_s_own_rate_is_given_with_its_alpha_and_its_source(
    cli: Callable[..., Any], tiny_run: list[str]
) -> None:
    words = ["inspect", "--json", *tiny_run, "optimizer.lr=auto"]
    done = cli(*words, "+model.published_rate={eta_B: 1e-3, at_alpha: 32, source: a page}")
    assert done.status == 0, done.err
    assert "optimizer.lr=auto is 0.00025 (a page: 0.001 at lora_alpha 32)" in done.out  # x 32 / 16 / 8
    done = cli(*words, "+model.published_rate={eta_B: -1, source: a page}")
    assert done.status == 1
    assert "model.published_rate needs eta_B, at_alpha and source; wrong or missing: eta_B, at_alpha" in done.err


def test_a_run_stores_the_number_and_says_where_it_comes_from(
    cli: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    words = [*tiny_run, "optimizer.lr=auto", "trainer.max_steps=1"]
    done = cli(*words, "hydra.run.dir=run")
    assert done.status == 0, done.err
    expected = float(f"{5e-4 * (2000 / 32) ** 0.781 * 32 / 16 / 8:.3g}")  # a Llama of hidden size 32
    assert f"optimizer.lr=auto is {expected:g} (tinker-cookbook's rule for LoRA's rate, hidden size 32)" in done.out
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert stored["optimizer"]["lr"] == expected
    # The same command finds the finished run again.
    again = cli(*words, "hydra.run.dir=run", "trainer.resume_from_checkpoint=auto")
    assert again.status == 0, again.err


def test_a_config_that_resolves_auto_needs_no_command_line(compose: Callable[..., Any]) -> None:
    register()
    config = compose("optimizer.lr=auto", "loraplus.ratio=2")
    assert config.optimizer.lr == pytest.approx(8e-3 / 2)
