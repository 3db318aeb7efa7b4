"""`inspect`: true rows, true memory, good advice, no weights, no run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra.loraplus.advice import initialisation, published_product, rate_advice
from loraplus_hydra.loraplus.memory import estimate
from loraplus_hydra.loraplus.plan import table_rows
from loraplus_hydra.loraplus.roles import tensor_records
from loraplus_hydra.loraplus.rules import TensorRecord
from tests.conftest import Finished


def test_prints_a_row_for_each_kind_of_tensor(cli: Callable[..., Finished], tiny_model: Path, tmp_path: Path) -> None:
    finished = cli("inspect", "model=hub", f"model.path={tiny_model}", "adapter=dora", "loraplus.ratio=4")
    assert finished.status == 0, finished.err
    for words in ("lora_A", "lora_B", "magnitude", "groupA", "groupB_no_decay", "0.0002", "frozen weights"):
        assert words in finished.out
    assert list(tmp_path.iterdir()) == []


def test_lists_each_tensor_with_its_reason_on_request(cli: Callable[..., Finished], tiny_model: Path) -> None:
    finished = cli("inspect", "--tensors", "model=hub", f"model.path={tiny_model}")
    assert "Every trained tensor" in finished.out
    assert "role: lora_B" in finished.out


def test_needs_no_rows(cli: Callable[..., Finished], tiny_model: Path) -> None:
    assert cli("inspect", "model=hub", f"model.path={tiny_model}", "data=jsonl").status == 0


def test_wrong_config_is_told(cli: Callable[..., Finished], tiny_model: Path) -> None:
    finished = cli("inspect", "model=hub", f"model.path={tiny_model}", "loraplus.ratio=0", "adapter.r=0")
    assert finished.status == 1
    assert "2 errors:" in finished.err


def test_json_agrees_with_what_a_run_writes(
    cli: Callable[..., Finished], compose: Callable[..., Any], tiny_run: list[str], tmp_path: Path
) -> None:
    from loraplus_hydra import run

    overrides = [*tiny_run, "adapter=dora", "adapter.bias=all", "optimizer.weight_decay=0.01"]
    told = json.loads(cli("inspect", "--json", *overrides).out)
    run(compose(*overrides), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "param_groups.json").read_text())
    keys = ("name", "role", "rule", "group", "shape", "lr", "weight_decay")
    assert [{key: tensor[key] for key in keys} for tensor in told["tensors"]] == written
    assert sum(row["tensors"] for row in told["rows"]) == len(written)


def tensor_bytes(tensors: Any) -> int:
    """Bytes of all distinct tensors in nested containers."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for name, item in value.items():
                if not str(name).startswith("qmap"):
                    walk(item)

    walk(tensors)
    return sum(found.values())


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        *((name, "float32") for name in ("adamw", "sgd", "adafactor", "lion", "lion8bit", "paged_adamw32bit")),
        *(("adamw8bit", dtype) for dtype in ("float32", "bfloat16")),
        *(("adamw", dtype) for dtype in ("bfloat16", "float16")),
        ("sgd", "bfloat16"),
    ],
)
def test_memory_is_within_five_percent_of_a_real_run(
    optimizer: str, dtype: str, compose: Callable[..., Any], tiny_model: Path
) -> None:
    from loraplus_hydra.loraplus.optimizer import build_optimizer
    from loraplus_hydra.models.adapter import add_adapter
    from loraplus_hydra.models.base_model import load_model
    from loraplus_hydra.training.prepare import loraplus_settings, plan_on_meta

    config = compose(
        "model=hub",
        f"model.path={tiny_model}",
        f"optimizer={optimizer}",
        f"model.dtype={dtype}",
        "adapter.r=64",
        "+adapter.modules_to_save=[lm_head]",
    )
    meta, plan = plan_on_meta(config)
    told = estimate(meta, plan)

    model = add_adapter(load_model(config.model, config.task.auto_class), config.adapter, config.task.task_type)
    settings = loraplus_settings(config)
    groups = settings.plan(model).groups
    made = build_optimizer(
        settings.optimizer_class, groups, model.named_parameters(), dict(settings.optimizer_arguments)
    )
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    made.step()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {parameter.data_ptr(): parameter for parameter in model.parameters() if not parameter.requires_grad}
    assert told.adapter == sum(parameter.numel() * parameter.element_size() for parameter in trained)
    assert told.gradients == sum(parameter.grad.numel() * parameter.grad.element_size() for parameter in trained)
    assert told.weights == pytest.approx(sum(p.numel() * p.element_size() for p in frozen.values()), rel=0.05)
    assert told.optimizer == pytest.approx(sum(tensor_bytes(state) for state in made.state.values()), rel=0.05)
    sizes = {tensor.record.name: tensor.state.bits for tensor in plan.tensors if tensor.state is not None}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = [x for x in made.state[parameter].values() if isinstance(x, torch.Tensor)]
            widths = [each.element_size() * 8 for each in own if each.shape == parameter.shape]
            assert sizes[name] == max(widths, default=0)


def test_state_bits_are_those_of_the_optimizer(compose: Callable[..., Any], tiny_model: Path) -> None:
    from loraplus_hydra.training.prepare import plan_on_meta

    base = ["model=hub", f"model.path={tiny_model}", "adapter.r=128", "adapter.target_modules=[q_proj,embed_tokens]"]
    _, plan = plan_on_meta(compose(*base, "optimizer=adamw8bit"))
    bits = {row.role: row.state_bits for row in table_rows(plan)}
    assert bits == {"lora_A": 8, "lora_B": 8, "lora_embedding_A": 32, "lora_embedding_B": 32}
    _, plan = plan_on_meta(compose(*base, "optimizer=adamw"))
    assert {row.state_bits for row in table_rows(plan)} == {32}
    _, plan = plan_on_meta(compose(*base, "optimizer=sgd"))
    assert {row.state_bits for row in table_rows(plan)} <= {0, 32}


STARTS = {
    "lora": "Init[1]",
    "dora": "Init[1]",
    "eva": "Init[1]",
    "lora_a_zero": "Init[2]",
    "lora_embeddings": "Init[1]",
    "pissa": None,
    "olora": None,
}


@pytest.mark.parametrize("adapter", STARTS)
def test_start_and_advice_are_those_of_the_run(adapter: str, compose: Callable[..., Any], tiny_model: Path) -> None:
    """Without weights the start is known from the config, and with them it is what the values are."""
    from loraplus_hydra.models.adapter import add_adapter
    from loraplus_hydra.models.base_model import load_model
    from loraplus_hydra.training.prepare import plan_on_meta

    config = compose("model=hub", f"model.path={tiny_model}", f"adapter={adapter}")
    records = plan_on_meta(config)[1].records
    model = add_adapter(load_model(config.model, config.task.auto_class), config.adapter, config.task.task_type)
    values = dict(model.named_parameters())
    assert {r.name: r.starts_at_zero for r in records} == {
        name: not values[name].any() for name in values if values[name].requires_grad
    }
    assert initialisation(records) == initialisation(tensor_records(model)) == STARTS[adapter]
    for given in ((0.5, 0.1, 0.1), (4, 0.1, 0.1), (16, 1.0, 0.1)):
        assert rate_advice(records, *given) == rate_advice(tensor_records(model), *given)
    assert bool(rate_advice(records, 4, 0.1, 0.1)) is (adapter == "lora_a_zero")
    assert bool(rate_advice(records, 16, 1.0, 0.1)) is (STARTS[adapter] == "Init[1]")


def test_inspect_tells_the_ratio_of_init_2(cli: Callable[..., Finished], tiny_model: Path) -> None:
    overrides = ["model=hub", f"model.path={tiny_model}", "adapter=lora_a_zero"]
    assert "about 16, not 4" in cli("inspect", *overrides, "loraplus.ratio=4").out
    assert "Note:" not in cli("inspect", *overrides, "loraplus.ratio=16").out


def test_an_adapter_that_goes_on_gets_no_advice_on_its_start(
    compose: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Its config still tells the start that it had when it was new."""
    from loraplus_hydra.models.adapter import add_adapter
    from loraplus_hydra.models.base_model import load_model
    from loraplus_hydra.training.prepare import plan_on_meta

    config = compose("model=hub", f"model.path={tiny_model}")
    new = add_adapter(load_model(config.model, config.task.auto_class), config.adapter, config.task.task_type)
    new.save_pretrained(tmp_path)
    config = compose("model=hub", f"model.path={tiny_model}", "adapter=existing", f"adapter.path={tmp_path}")
    on = add_adapter(load_model(config.model, config.task.auto_class), config.adapter, config.task.task_type)
    for records in (plan_on_meta(config)[1].records, tensor_records(on)):
        assert {record.role for record in records} == {"lora_A", "lora_B"}
        assert rate_advice(records, 16, 1.0, 0.1) == []


def test_inspect_and_a_run_name_the_equal_run_of_plain_lora(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_run, "loraplus.ratio=4", "optimizer.weight_decay=0.1", "trainer.max_steps=1"]
    expected = (
        "alpha x eta_B = 16 x 0.004 = 0.064; init_A / eta_A = 102 steps",
        "Equal to plain LoRA with loraplus=none adapter.lora_alpha=64 optimizer.lr=0.001, except for: eps,",
        "Rate x weight decay, per step: groupA 0.0001, groupB 0.0004",
    )
    for words in (["inspect", *overrides], [*overrides, f"hydra.run.dir={tmp_path / 'run'}"]):
        finished = cli(*words)
        assert finished.status == 0, finished.err
        assert all(line in finished.out for line in expected), finished.out
    explanation = json.loads(cli("inspect", "--json", "adapter=vera", "loraplus=roles").out)["explanation"]
    assert explanation == []


def test_the_equal_run_can_be_trained_where_its_alpha_is_a_fraction(
    cli: Callable[..., Finished], tiny_run: list[str], tmp_path: Path
) -> None:
    words = [*tiny_run, "adapter=lora_a_zero", "trainer.max_steps=1"]
    line = next(line for line in cli("inspect", *words, "loraplus.ratio=10").out.splitlines() if "Equal to" in line)
    equal = line.partition("with ")[2].partition(",")[0].split()
    assert "adapter.lora_alpha=1.6" in equal
    run = tmp_path / "run"
    finished = cli(*words, *equal, f"hydra.run.dir={run}")
    assert finished.status == 0, finished.err
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 1.6
    assert cli("predict", str(run), "text=say one").status == 0


def record(role: str, zero: bool) -> TensorRecord:
    return TensorRecord(name=role, role=role, owner="Linear", shape=(8, 8), adapter="default", starts_at_zero=zero)


INIT_1 = [record("lora_A", False), record("lora_B", True)]
INIT_2 = [record("lora_A", True), record("lora_B", False)]


@pytest.mark.parametrize(
    ("records", "ratio", "product", "said"),
    [
        (INIT_1, 8, 0.1, None),
        (INIT_1, 64, 0.29, None),  # the ratio alone says nothing
        (INIT_1, 1, 0.31, "3.1 times the 0.1"),
        (INIT_1, 8, None, None),
        (INIT_2, 16, 1.0, None),
        (INIT_2, 10, 0.1, None),  # the authors' own, with GPT-2
        (INIT_2, 4, 0.1, "about 16"),
        (INIT_2, 1, 0.1, None),
        (INIT_1, 0.5, 0.1, "smaller rate"),
    ],
)
def test_advice_is_that_of_its_sources(
    records: list[TensorRecord], ratio: float, product: float | None, said: str | None
) -> None:
    advice = rate_advice(records, ratio, product, 0.1)
    assert len(advice) == (said is not None)
    assert said is None or said in advice[0]
    assert rate_advice(INIT_1, 8, product, None) == []


# 5e-4 x (2000 / hidden)^P x 32 by hand
@pytest.mark.parametrize(
    ("kind", "hidden", "product"),
    [("llama", 2000, 0.016), ("llama", 4096, 0.0091429), ("qwen2", 896, 0.0170264), ("mistral", 4096, 0.0091429)],
)
def test_the_published_rule_is_that_of_its_source(kind: str, hidden: int, product: float) -> None:
    assert published_product(kind, hidden) == pytest.approx(product, rel=1e-3)


def test_initialisation_is_named_as_in_the_paper() -> None:
    assert (initialisation(INIT_1), initialisation(INIT_2), initialisation([])) == ("Init[1]", "Init[2]", None)
