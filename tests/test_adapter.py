"""Adapters: where each starts, what is saved of it, AdaLoRA's schedule, and going on with an existing one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loraplus_hydra.adapter import add_adapter
from loraplus_hydra.adapter_folder import save_adapter
from loraplus_hydra.errors import ConfigErrors, UserError
from tests.architectures import CAUSAL, tokenizer
from tests.conftest import Finished
from tests.finished_runs import quick_run

TOKENS = torch.arange(3, 51).reshape(4, 12)
OPTIONS = ("lora", "rslora", "dora", "pissa", "olora", "lora_a_zero", "lora_embeddings", "adalora", "vera")


def base_of(folder: Path, architecture: str = "llama") -> Any:
    auto = AutoModelForCausalLM if architecture in CAUSAL else AutoModelForSequenceClassification
    return auto.from_pretrained(folder)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def train(model: Any, steps: int = 3, causal: bool = True) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS if causal else torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "roberta"])
def test_adapter_starts_as_the_base_and_its_file_is_right_on_the_base(
    architecture: str, option: str, checkpoints: Any, tmp_path: Path, compose: Callable[..., DictConfig]
) -> None:
    folder, causal = checkpoints(architecture), architecture in CAUSAL
    config = compose(f"adapter={option}", "loraplus=roles")
    torch.manual_seed(0)
    if (architecture, option) == ("gpt2", "olora"):
        for on_meta in (True, False):
            with pytest.raises(ConfigErrors, match="doesn't know the Conv1D layers"):
                add_adapter(base_of(folder, architecture), config.adapter, "CAUSAL_LM", on_meta=on_meta)
        return
    before = logits(base_of(folder, architecture))
    model = add_adapter(base_of(folder, architecture), config.adapter, "CAUSAL_LM" if causal else "SEQ_CLS")
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)
    train(model, causal=causal)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-5
    save_adapter(model, tokenizer(), tmp_path)
    again = logits(PeftModel.from_pretrained(base_of(folder, architecture), tmp_path))
    if option in ("pissa", "olora"):  # the residual base was rounded
        torch.testing.assert_close(again, trained, atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(again, trained)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    if stored["peft_type"] == "LORA":
        assert stored["init_lora_weights"] in (True, False), "a plain LoRA, whatever it started from"
        assert not any("embed_tokens.base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_conversion_equals_pefts_own(start: str, use_rslora: bool, checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints("llama")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=start, use_rslora=use_rslora)
    model = get_peft_model(base_of(folder), config)
    model.save_pretrained(tmp_path / "initial")
    train(model)
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))

    adapter = OmegaConf.create(
        {
            "_target_": "peft.LoraConfig",
            "r": 4,
            "target_modules": "all-linear",
            "init_lora_weights": start,
            "use_rslora": use_rslora,
        }
    )
    ours = add_adapter(base_of(folder), adapter, None)
    train(ours)
    save_adapter(ours, tokenizer(), tmp_path / "ours")
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora", "target_modules"):
        one, other = (sorted(c[key]) if isinstance(c[key], list) else c[key] for c in configs)
        assert one == other, key


def test_conversion_keeps_a_classifiers_head(checkpoints: Any, tmp_path: Path, compose: Callable[..., Any]) -> None:
    model = add_adapter(base_of(checkpoints("bert"), "bert"), compose("adapter=pissa").adapter, "SEQ_CLS")
    train(model, causal=False)
    save_adapter(model, tokenizer(), tmp_path)
    fresh = base_of(checkpoints("bert"), "bert")
    torch.nn.init.normal_(fresh.classifier.weight)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, tmp_path)), logits(model), atol=2e-6, rtol=1e-5)


def test_a_zero_is_the_reverse_of_pefts_start(checkpoints: Any, compose: Callable[..., DictConfig]) -> None:
    def start(seed: int, *overrides: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = add_adapter(base_of(checkpoints("llama")), compose(*overrides, "adapter.r=16").adapter, "CAUSAL_LM")
        return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

    reverse = start(0, "adapter=lora_a_zero")
    a = [tensor for name, tensor in reverse.items() if ".lora_A." in name]
    b = torch.cat([tensor.flatten() for name, tensor in reverse.items() if ".lora_B." in name])
    assert all((tensor == 0).all() for tensor in a)
    # Uniform within 1 / sqrt(r): that is its deviation, and no number is outside.
    assert b.abs().max() <= 1 / math.sqrt(16)
    assert b.std().item() == pytest.approx(1 / math.sqrt(3 * 16), rel=0.02)
    again, other = start(0, "adapter=lora_a_zero"), start(1, "adapter=lora_a_zero")
    assert all(torch.equal(reverse[name], again[name]) for name in reverse)
    assert not all(torch.equal(reverse[name], other[name]) for name in reverse)
    by_key = start(0, "adapter.init_lora_weights=a_zero")
    assert all(torch.equal(reverse[name], by_key[name]) for name in reverse)


@pytest.mark.parametrize(
    "also", [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_a_zero_starts_as_the_base_whatever_else_the_adapter_has(also: dict[str, Any], checkpoints: Any) -> None:
    adapter = {"_target_": "peft.LoraConfig", "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "a_zero"}
    model = add_adapter(base_of(checkpoints("llama")), {**adapter, **also}, "CAUSAL_LM")
    torch.testing.assert_close(logits(model), logits(base_of(checkpoints("llama"))), atol=1e-6, rtol=1e-5)


def test_embeddings_join_all_linears_whatever_they_are_called(checkpoints: Any, compose: Callable[..., Any]) -> None:
    adapter = compose("adapter=lora_embeddings").adapter
    for architecture, name in (("llama", "embed_tokens"), ("gpt2", "wte"), ("bert", "word_embeddings")):
        model = add_adapter(base_of(checkpoints(architecture), architecture), adapter, None)
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert {key.split(".")[-3] for key in trained if "lora_embedding_A" in key} == {name}
        assert any("lora_A" in key for key in trained)
        assert not any("lm_head" in key for key in trained)


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga", "loftq"])
def test_starts_that_need_more_than_a_config_are_refused(
    start: str, cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, f"adapter.init_lora_weights={start}")
    assert ended.status == 1
    assert f"adapter.init_lora_weights: '{start}' can't be had here" in ended.err


def test_vera_needs_a_preset_that_splits_it(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    ended = cli("check", *tiny_run, "adapter=vera")
    assert ended.status == 1
    assert "loraplus=roles" in ended.err
    assert cli("check", *tiny_run, "adapter=vera", "loraplus=roles").status == 0


def test_any_other_method_of_peft_goes_by_its_class(
    tiny_run: list[str], compose: Callable[..., DictConfig], tmp_path: Path, tiny_model: Path
) -> None:
    overrides = ["adapter._target_=peft.LoHaConfig", "~adapter.lora_alpha", "~adapter.lora_dropout", "~adapter.bias"]
    overrides += ["~adapter.init_lora_weights", "loraplus=none", "trainer.max_steps=2", "task.samples=0"]
    result = quick_run(compose(*tiny_run, *overrides), tmp_path / "run")
    assert result.steps == 2
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "run" / "adapter")
    assert model.active_peft_config.peft_type == "LOHA"


# --- AdaLoRA


def ada_run(tiny_run: list[str], compose: Callable[..., Any], folder: Path, *overrides: str) -> Any:
    from loraplus_hydra import adalora

    ranks: list[int] = []
    budgets: list[int] = []
    after = adalora.AdaLoraCallback.on_optimizer_step

    def recorded(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after(self, args, state, control, **kwargs)
        ranks.append(sum(sum(kept) for kept in adalora.kept_ranks(self.tuner.model).values()))
        budgets.append(self.tuner.rankallocator.budget_schedule(state.global_step + 1)[0])

    adalora.AdaLoraCallback.on_optimizer_step = recorded  # type: ignore[method-assign]
    try:
        base = ["adapter=adalora", "loraplus=roles", "adapter.deltaT=1", "adapter.init_r=6", "adapter.target_r=2"]
        result = quick_run(compose(*tiny_run, *base, "task.samples=0", *overrides), folder)
    finally:
        adalora.AdaLoraCallback.on_optimizer_step = after  # type: ignore[method-assign]
    return result, ranks, budgets


def test_adalora_cuts_ranks_as_its_schedule_says(
    tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path, tiny_model: Path
) -> None:
    """Steps 1 and 2 of 20 keep all ranks, then they fall by the cube, and the last 5 steps train at the target."""
    overrides = ("trainer.max_steps=20", "adapter.tinit=0.1", "adapter.tfinal=0.25", "optimizer.lr=1e-2")
    result, ranks, budgets = ada_run(tiny_run, compose, tmp_path / "run", *overrides)
    layers = 14
    expected = [
        6 * layers if step <= 2 else int(4 * layers * max(0.0, 1 - (step - 2) / 13) ** 3 + 2 * layers)
        for step in range(1, 21)
    ]
    assert budgets == expected, "PEFT's own schedule, over the run's own steps"
    assert all(rank <= budget for rank, budget in zip(ranks, budgets, strict=True))
    assert ranks[:2] == [84, 84]
    assert ranks[-6:] == [2 * layers] * 6
    assert ranks == sorted(ranks, reverse=True)

    stored = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (stored["total_step"], stored["tinit"], stored["tfinal"]) == (20, 2, 5)
    assert stored["orth_reg_weight"] == 0.1
    assert sum(sum(kept) for kept in stored["rank_pattern"].values()) == 2 * layers
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(len(tensor) for name, tensor in tensors.items() if "lora_E" in name) == 2 * layers
    assert result.value == pytest.approx(evaluated(tmp_path / "run"), abs=1e-5)


def evaluated(folder: Path) -> float:
    from loraplus_hydra.commands.evaluate import evaluate
    from loraplus_hydra.finished import open_run

    return evaluate(open_run(str(folder), groups=None))["eval_loss"]


def test_adalora_penalty_is_in_the_gradients_once_and_in_no_loss(checkpoints: Any, compose: Callable[..., Any]) -> None:
    from loraplus_hydra.adalora import AdaLoraCallback, orthogonality

    torch.manual_seed(0)
    model = add_adapter(base_of(checkpoints("llama")), compose("adapter=adalora").adapter, "CAUSAL_LM")
    plain = base_of(checkpoints("llama"))
    callback = AdaLoraCallback(model, 0, 0)
    losses = [one(input_ids=TOKENS, labels=TOKENS).loss for one in (model, plain)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    named = dict(model.named_parameters())
    name = next(name for name in named if ".lora_A." in name)
    without = named[name].grad.clone()
    callback.on_pre_optimizer_step(None, None, None)
    expected = torch.autograd.grad(0.1 * orthogonality(model.base_model.model), named[name])[0]
    torch.testing.assert_close(named[name].grad, without + expected)
    # PEFT's own term, which it adds to a loss
    model.active_peft_config.orth_reg_weight = 0.1
    with_penalty = model(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(with_penalty - losses[1], 0.1 * orthogonality(model.base_model.model))


@pytest.mark.parametrize("stopped_after", [4, 16])  # while ranks are cut, and after
def test_adalora_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    stopped_after: int, tiny_run: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    overrides = ("trainer.max_steps=20", "adapter.tinit=2", "adapter.tfinal=5", "optimizer.lr=1e-2")
    overrides += (f"trainer.save_steps={stopped_after}", "trainer.save_total_limit=null")
    whole, ranks, _ = ada_run(tiny_run, compose, tmp_path / "whole", *overrides)
    kept = tmp_path / "whole" / "checkpoints" / f"checkpoint-{stopped_after}"
    again, rest, _ = ada_run(
        tiny_run, compose, tmp_path / "again", *overrides, f"trainer.resume_from_checkpoint={kept}"
    )
    assert rest == ranks[stopped_after:]
    assert again.value == whole.value
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adaloras_phases() -> None:
    from loraplus_hydra.adalora import phases

    assert phases(100, 0.1, 0.3) == (10, 30)
    assert phases(100, 10, 30) == (10, 30)
    assert phases(2, 0.1, 0.3) == (0, 0), "shares leave room for cutting in the shortest run"
    for total, first, last in ((1, 0, 0), (10, 5, 4), (10, 0.95, 0.3)):
        with pytest.raises(UserError, match="fewer than two"):
            phases(total, first, last)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("+adapter.total_step=9", "adapter.total_step: comes from the run's own number of steps"),
        ("adapter.tinit=-1", "adapter.tinit: -1 is out of range"),
        ("adapter.tfinal=2.5", "adapter.tfinal: 2.5 is out of range"),
        ("adapter.target_r=12", "adapter.target_r: 12 isn't below adapter.init_r = 12"),
        ("adapter.tinit=3", "leave fewer than two"),
    ],
)
def test_wrong_adalora_is_told(override: str, told: str, cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    ended = cli("check", *tiny_run, "adapter=adalora", "loraplus=roles", override)
    assert ended.status == 1
    assert told in ended.err


# --- going on with an existing adapter


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: list[str]) -> Path:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from loraplus_hydra.paths import config_folder
    from loraplus_hydra.schema import register

    register()
    GlobalHydra.instance().clear()
    folder = tmp_path_factory.mktemp("first") / "run"
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        config = compose("config", overrides=[*tiny_run, "adapter.r=4", "task.samples=0"])
    quick_run(config, folder)
    return folder


@pytest.mark.parametrize("adapter", [["adapter=existing"], ["adapter=lora", "adapter.r=4"]])
@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_run_goes_on_where_an_adapter_ended(
    inside: str, adapter: list[str], first_run: Path, tiny_run: list[str], compose: Any, tmp_path: Path
) -> None:
    path = f"adapter.path={first_run / inside}"
    second = quick_run(compose(*tiny_run, *adapter, path, "task.samples=0"), tmp_path / "second")
    ended = json.loads((first_run / "result.json").read_text())["metrics"]["eval_loss"]
    assert second.metrics_before["eval_loss"] == pytest.approx(ended, abs=1e-6)
    assert second.value < ended
    tensors = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first_run, tmp_path / "second")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["adapter.r=8"], "adapter.r: is 8, but 4 in the adapter at adapter.path; adapter=existing"),
        (["adapter.r=4", "adapter.use_dora=true"], "adapter.use_dora: is True, but None in the adapter"),
        (["adapter.r=4", "adapter.target_modules=[q_proj]"], "in the adapter, but"),
        (["adapter.r=4", "adapter.lora_alpha=32"], "adapter.lora_alpha: is 32, but 16 in the adapter"),
    ],
)
def test_an_adapter_that_is_not_as_the_config_says_is_refused(
    overrides: list[str], told: str, first_run: Path, tiny_run: list[str], cli: Callable[..., Finished]
) -> None:
    overrides = [f"+{text}" if "use_dora" in text else text for text in overrides]
    ended = cli("check", *tiny_run, f"adapter.path={first_run}", *overrides)
    assert ended.status == 1
    assert told in ended.err


def test_an_adapter_that_cannot_be_gone_on_with_is_refused(
    first_run: Path, tiny_run: list[str], cli: Callable[..., Finished], tmp_path: Path, checkpoints: Any
) -> None:
    def told(folder: Path, *overrides: str) -> str:
        ended = cli("check", *tiny_run, "adapter=existing", f"adapter.path={folder}", *overrides)
        assert ended.status == 1
        assert "Traceback" not in ended.err
        return ended.err

    assert "there is no adapter_config.json" in told(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(first_run / "adapter", broken)
    weights = load_file(broken / "adapter_model.safetensors")
    (broken / "adapter_model.safetensors").unlink()
    torch.save(weights, broken / "adapter_model.bin")
    assert "only safetensors are read" in told(broken)
    save_file(
        {name: tensor[:, :-1].contiguous() for name, tensor in weights.items()}, broken / "adapter_model.safetensors"
    )
    assert "in the adapter, but" in told(broken)
    (broken / "adapter_config.json").write_text("{}")
    assert "can't be read" in told(broken)
    (broken / "adapter_config.json").write_text('{"peft_type": "NOTHING"}')
    assert "can't be read" in told(broken)
    assert "the adapter was trained on" in told(first_run, f"model.path={checkpoints('llama')}")


def test_existing_needs_a_path(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    ended = cli("check", *tiny_run, "adapter=existing")
    assert ended.status == 1
    assert "adapter.path: is not set" in ended.err


@pytest.mark.parametrize("adapter", ["lora", "dora", "olora", "adalora", "vera", "lora_embeddings", "lora_a_zero"])
def test_what_trains_is_the_same_on_the_meta_device(
    adapter: str, tiny_model: Path, compose: Callable[..., Any]
) -> None:
    from loraplus_hydra.adapter import add_adapter
    from loraplus_hydra.check.dry_run import adapted_meta_model
    from loraplus_hydra.model import load_base
    from loraplus_hydra.roles import tensor_records
    from loraplus_hydra.tokenizer import load_tokenizer

    config = compose("model=hub", f"model.path={tiny_model}", f"adapter={adapter}", "loraplus=roles")
    base = load_base(config, load_tokenizer(config.model), {})
    real = tensor_records(add_adapter(base, config.adapter, config.task.task_type))
    told = tensor_records(adapted_meta_model(config, {}))
    assert [(each.name, each.role, each.shape) for each in told] == [
        (each.name, each.role, each.shape) for each in real
    ]
