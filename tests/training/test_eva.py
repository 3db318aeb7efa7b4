"""EVA's start against PEFT's own functions, called by hand on the same batches, and what follows from it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from loraplus_hydra import run
from loraplus_hydra.errors import UserError
from loraplus_hydra.runs.finished import open_run
from loraplus_hydra.runs.load_finished import load_run
from loraplus_hydra.training.hf_trainer import eva
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.prepare import prepare
from tests.conftest import Finished
from tests.support.architectures import TOKENS, base_of, checkpoint
from tests.support.forking import differences

EVA = ("adapter=eva", "adapter.r=2", "trainer.per_device_train_batch_size=8", "trainer.use_cpu=true", "task.samples=0")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers: from twenty adapted layers on, PEFT shortens their names."""
    return checkpoint("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


@pytest.fixture
def started(rows: Path, compose: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes a run's Trainer; its model has started."""

    def start(folder: Path, *overrides: str) -> Any:
        config = compose("model=hub", f"model.path={folder}", "data=jsonl", f"data.train={rows}", *EVA, *overrides)
        return make_trainer(prepare(config), tmp_path / "trainer")

    return start


class Batches:
    """The run's batches, with the arguments of the model alone; PEFT repeats them as often as it needs."""

    def __init__(self, trainer: Any, seed: int, keys: tuple[str, ...]) -> None:
        self.trainer, self.seed, self.keys = trainer, seed, keys

    def __len__(self) -> int:
        return len(self.trainer.train_dataset) // 8

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.Generator().manual_seed(self.seed)
        rows = self.trainer.train_dataset
        loader = DataLoader(
            rows, 8, shuffle=True, generator=order, drop_last=True, collate_fn=self.trainer.data_collator
        )
        while True:
            for batch in loader:
                yield {key: batch[key] for key in self.keys}


KEYS = ("input_ids", "attention_mask", "labels")
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # architecture, overrides, arguments of LoraConfig, of EvaConfig, keys of a batch
    "tokens with loss": ("llama", (), {}, {}, KEYS),
    "all tokens, equal ranks, whitened": (
        "gpt2",
        ("adapter.eva_config={rho: 1, tau: 0.95, use_label_mask: false, whiten: true}", "seed=3"),
        {"fan_in_fan_out": True},
        {"rho": 1.0, "tau": 0.95, "use_label_mask": False, "whiten": True},
        KEYS,
    ),
    "equal alphas, rsLoRA, DoRA": (
        "llama",
        ("adapter.eva_config.adjust_scaling_factors=false", "+adapter.use_rslora=true", "+adapter.use_dora=true"),
        {"use_rslora": True, "use_dora": True},
        {"adjust_scaling_factors": False},
        KEYS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_and_factors_are_those_of_pefts_own_function(
    case: str, started: Callable[..., Any], checkpoints: Any, llama: Path
) -> None:
    architecture, overrides, of_lora, of_eva, keys = CASES[case]
    folder = llama if architecture == "llama" else checkpoints(architecture)
    trainer = started(folder, *overrides)
    seed = 3 if "seed=3" in overrides else 0
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **of_lora},
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(**of_eva),
    )
    model = get_peft_model(base_of(folder, architecture), config)
    peft.initialize_lora_eva_weights(model, Batches(trainer, seed, keys), show_progress_bar=False)
    expected = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    found = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(trainer.model.active_peft_config, field) == getattr(config, field)
    ranks = {len(tensor) for name, tensor in found.items() if "lora_A" in name}
    assert (ranks == {2}) is (of_eva.get("rho") == 1.0)


def test_layer_of_rank_zero_has_no_adapter_and_the_file_fits_peft(
    rows: Path, llama: Path, compose: Callable[..., Any], tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    base = ("model=hub", f"model.path={llama}", "data=jsonl", f"data.train={rows}")
    overrides = (*base, *EVA, "adapter.r=1", "adapter.eva_config.rho=8", "trainer.max_steps=3", "trainer.save_steps=1")
    result = run(compose(*overrides), tmp_path / "run")
    stored = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    ranks = [len(tensor) for name, tensor in tensors.items() if "lora_A" in name]
    assert sum(ranks) == 21, "the sum of the ranks stays"
    assert len(ranks) < 21, "no layer has rank 0, so this test shows nothing"
    assert (stored["init_lora_weights"], stored["eva_config"]) == (True, None)
    assert len(stored["target_modules"]) == len(ranks)
    plan = json.loads((tmp_path / "run/param_groups.json").read_text())
    assert {row["name"].replace(".default", ""): tuple(row["shape"]) for row in plan} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert {(row["role"], row["lr"]) for row in plan} == {("lora_A", 5e-5), ("lora_B", 4e-4)}
    assert result.trained_parameters == sum(tensor.numel() for tensor in tensors.values())

    plain = PeftModel.from_pretrained(base_of(llama), tmp_path / "run/adapter").eval()
    opened, _ = load_run(open_run(str(tmp_path / "run")))
    of_checkpoint, _ = load_run(open_run(str(tmp_path / "run"), checkpoint="3"))
    with torch.no_grad():
        logits = [model(input_ids=TOKENS).logits for model in (plain, opened, of_checkpoint)]
    assert all(torch.equal(each, logits[0]) for each in logits)
    assert cli("export", "run", "to=merged").status == 0
    refused = cli("export", "run", "to=adapter", "target=llama_cpp", "merge=false")
    assert refused.status == 1
    further = cli(*base, "adapter=existing", "adapter.path=run", "trainer.max_steps=1", "hydra.run.dir=further")
    assert further.status == 0, further.err
    assert "EVA" not in further.out


@pytest.mark.parametrize("also", [(), pytest.param(("quantization=nf4", "trainer.ema=0.9"), marks=pytest.mark.slow)])
def test_stopped_run_goes_on_without_a_pass_to_the_bits_of_the_unbroken_one(
    also: tuple[str, ...],
    rows: Path,
    llama: Path,
    compose: Callable[..., Any],
    cli: Callable[..., Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = ("model=hub", f"model.path={llama}", "data=jsonl", f"data.train={rows}")
    steps = ("trainer.save_steps=3", "trainer.eval_steps=3", "trainer.logging_steps=1", "trainer.save_total_limit=null")
    overrides = (*base, *EVA, *steps, "trainer.max_steps=6", "optimizer.lr=1e-3", "adapter.lora_dropout=0.1", *also)
    for name in ("unbroken", "broken"):
        run(compose(*overrides), tmp_path / name)
    assert differences(tmp_path / "broken", tmp_path / "unbroken") == [], "the seed decides the start"

    def no_pass(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("loraplus_hydra.training.hf_trainer.assemble.start_from_rows", no_pass)
    resume = f"trainer.resume_from_checkpoint={tmp_path / 'broken/checkpoints/checkpoint-3'}"
    resumed = cli(*overrides, resume, "hydra.run.dir=resumed")
    assert resumed.status == 0, resumed.err
    assert differences(tmp_path / "resumed", tmp_path / "unbroken") == []
    other = cli(*overrides, resume, "hydra.run.dir=other", "adapter.r=1")
    assert (other.status, "doesn't belong to this run" in other.err) == (1, True), other.err


@pytest.mark.slow
def test_two_processes_start_as_one_does_and_resume(rows: Path, llama: Path, tmp_path: Path) -> None:
    from tests.runs.test_resume_distributed import started as processes

    base = ["model=hub", f"model.path={llama}", "data=jsonl", f"data.train={rows}", *EVA, "trainer.save_steps=2"]
    log = tmp_path / "log"
    both = [*base, "trainer.max_steps=2", "hydra.run.dir=two", "adapter.target_modules=all-linear+embeddings"]
    assert processes(*both, log=log).wait() == 0, log.read_text()[-3000:]
    one = [part.replace("=two", "=one") for part in both]
    command = [sys.executable, "-m", "loraplus_hydra", *one]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    plans = [json.loads((tmp_path / name / "param_groups.json").read_text()) for name in ("one", "two")]
    assert plans[0] == plans[1]
    assert processes("resume", "two", "trainer.max_steps=3", log=log).wait() == 0, log.read_text()[-3000:]


def test_bfloat16_base_gets_an_adapter_in_float32(started: Callable[..., Any], llama: Path) -> None:
    model = started(llama, "model.dtype=bfloat16").model
    assert {tensor.dtype for tensor in model.parameters() if tensor.requires_grad} == {torch.float32}
    assert model.active_peft_config.rank_pattern


def test_preferences_count_their_answers_tokens(
    started: Callable[..., Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "preferences.jsonl"
    lines = [{"prompt": f"say {i}", "chosen": f" one two {i}", "rejected": f" ten nine {i}"} for i in range(40)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = []
    counted = eva._counted
    monkeypatch.setattr(eva, "_counted", lambda *given: seen.append((given[0], counted(*given))) or seen[-1][1])
    started(llama, "task=dpo", f"data.train={rows}", "adapter.r=1")
    batch, mask = seen[0]
    assert torch.equal(mask, (batch["completion_mask"] * batch["attention_mask"]).bool())


def test_classifier_counts_all_tokens_but_padding_and_its_pooler_starts_as_usual(
    checkpoints: Any, compose: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"say {w} {i},{w}\n" for i in range(12) for w in ("one", "two")))
    base = ["model=hub", f"model.path={checkpoints('bert')}", "task=classification", "data=csv", f"data.train={rows}"]
    caplog.set_level("INFO")
    trainer = make_trainer(prepare(compose(*base, *EVA, "adapter.r=3")), tmp_path / "trainer")
    assert "EVA: bert.pooler.dense has no input for each token" in caplog.text
    # PEFT itself can't leave the pooler out of its pass
    lora = peft.LoraConfig(
        r=3,
        target_modules="all-linear",
        exclude_modules=["bert.pooler.dense"],
        task_type="SEQ_CLS",
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(),
    )
    model = get_peft_model(base_of(checkpoints("bert"), "bert"), lora)
    batches = Batches(trainer, 0, ("input_ids", "attention_mask"))
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    found = {name: tensor for name, tensor in trainer.model.named_parameters() if "lora_" in name}
    expected = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    assert {name for name in found if ".pooler." not in name} == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (of_pooler,) = (tensor for name, tensor in found.items() if ".pooler." in name and "lora_A" in name)
    assert (len(of_pooler), bool(of_pooler.any())) == (3, True)


@pytest.mark.slow
def test_embeddings_and_rows_of_new_tokens_start_as_usual(
    cli: Callable[..., Finished], llama: Path, rows: Path, tmp_path: Path
) -> None:
    base = ["model=hub", f"model.path={llama}", "data=jsonl", f"data.train={rows}", *EVA, "trainer.max_steps=2"]
    for name, overrides in {
        "embeddings": ["adapter.target_modules=all-linear+embeddings"],
        "new": ["model.add_tokens=['<a>']", "+adapter.rank_pattern={q_proj: 3, k_proj: 1}"],
    }.items():
        first = cli(*base, *overrides, f"hydra.run.dir={name}", "trainer.save_steps=2")
        assert first.status == 0, first.err
        assert "in 21 layers" in first.out
        resumed = cli("resume", name, "trainer.max_steps=3")
        assert (resumed.status, "EVA" in resumed.out) == (0, False), resumed.err
        config = json.loads((tmp_path / name / "adapter/adapter_config.json").read_text())
        assert ("model.embed_tokens" in config["target_modules"]) is (name == "embeddings")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["adapter.r=16"],
            ["adapter.r: EVA computes 2 x r x rho = 64 directions, but model.layers.0.self_attn.q_proj"],
        ),
        (["adapter.target_modules=[embed_tokens]"], ["adapter.target_modules: EVA starts linear layers, but none"]),
        (
            ["adapter.eva_config={rho: 0.5, tau: nan, whiten: perhaps}"],
            ["eva_config.rho: 0.5 is out of range", "eva_config.tau: nan is out of", "eva_config.whiten: 'perhaps'"],
        ),
        (["adapter.eva_config.rho=nan"], ["adapter.eva_config.rho: nan is out of range; it must be a finite"]),
        (["adapter.eva_config=x"], ["adapter.eva_config: 'x' is not a mapping"]),
        (["+adapter.use_rslora=true"], ["adapter.eva_config.adjust_scaling_factors: it keeps alpha / r equal"]),
        (
            ["+trainer.fsdp=full_shard", "data.streaming=true", "data.eval=${data.train}"],
            ["trainer.fsdp: may split the base model, and eva needs", "data.streaming: EVA's pass reads the rows"],
        ),
        (["adapter._target_=peft.AdaLoraConfig"], ["eva is a start of plain LoRA, and adapter._target_ is Ada"]),
        (["+adapter.target_parameters=[experts.up]"], ["adapter.target_parameters: EVA starts layers"]),
        (["adapter.eva_config.rhoo=2"], ["rhoo"]),
    ],
)
def test_what_eva_cannot_do_is_refused_before_the_weights(
    overrides: list[str], told: list[str], cli: Callable[..., Finished], tiny_run: list[str]
) -> None:
    ended = cli("check", *tiny_run, "adapter=eva", "adapter.r=2", *overrides)
    assert ended.status == 1
    assert all(each in ended.err for each in told), ended.err


def test_pass_that_would_not_end_is_an_error(
    started: Callable[..., Any], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"EVA needs 64 tokens in a batch .* none of 19 batches .*use_label_mask=false"):
        started(llama, "adapter.r=16", "trainer.per_device_train_batch_size=2")
    monkeypatch.setattr(eva, "_MOST", 5)
    with pytest.raises(UserError, match="still change after 5 batches, and 5 of them have the 8 tokens"):
        started(llama, "adapter.eva_config.tau=1")


def test_inspect_says_that_the_ranks_are_not_decided_yet(cli: Callable[..., Finished], tiny_run: list[str]) -> None:
    shown = cli("inspect", *tiny_run, "adapter=eva", "adapter.r=2")
    assert shown.status == 0, shown.err
    assert "EVA decides the ranks when training begins; until then each layer has rank 2" in " ".join(shown.out.split())
