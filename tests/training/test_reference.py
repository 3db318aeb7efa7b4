"""The model with which DPO and KTO compare: the one from which training begins, which making a Trainer leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplus_hydra.check.problems import check_config
from loraplus_hydra.errors import ConfigErrors
from loraplus_hydra.models.adapter_files import attach, save_adapter, stored_adapter
from loraplus_hydra.training.hf_trainer.assemble import make_trainer
from loraplus_hydra.training.prepare import Prepared, prepare
from tests.support.architectures import base_of
from tests.support.tiny import write_jsonl

Make = Callable[..., Prepared]
TOKENS = "model.add_tokens=['<aa>','<bb>']"


@pytest.fixture
def prepared(compose: Callable[..., Any], checkpoints: Callable[[str], Path], tmp_path: Path) -> Make:
    """Return a function that prepares a run of DPO or KTO on the tiny Qwen2."""
    asked = [{"prompt": f"say {i} please", "label": i % 2 == 0} for i in range(8)]
    dpo = write_jsonl(tmp_path / "pairs.jsonl", [{**row, "chosen": "it is", "rejected": "no"} for row in asked])
    kto = write_jsonl(tmp_path / "judged.jsonl", [{**row, "completion": "it is"} for row in asked])
    tasks = {"dpo": ["task=dpo", "data=jsonl", f"data.train={dpo}"], "kto": ["experiment=kto", f"data.train={kto}"]}

    def make(*overrides: str, task: str = "dpo", resumed: bool = False) -> Prepared:
        model = ["model=hub", f"model.path={checkpoints('qwen2')}", "trainer.use_cpu=true", "trainer.max_steps=2"]
        config = compose(*model, *tasks[task], "trainer.per_device_train_batch_size=4", *overrides)
        return prepare(config, resumed=resumed)

    return make


def logits(model: Any) -> torch.Tensor:
    rows = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(rows - 12, rows)[None]).logits  # new tokens are the last rows


def assert_exact(job: Prepared, before: torch.Tensor, folder: Path) -> Any:
    model = make_trainer(job, folder).model
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize(("start", "task"), [("pissa", "dpo"), ("olora", "kto")])
def test_start_that_changes_the_base_changes_it_once(
    start: str, task: str, prepared: Make, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    job = prepared(f"adapter={start}", task=task)
    model = assert_exact(job, logits(job.model), tmp_path / "run")
    assert model.peft_config["default"].init_lora_weights == start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained = logits(model)
    save_adapter(model, job.tokenizer, tmp_path / "saved")
    loaded = attach(base_of(checkpoints("qwen2")), stored_adapter(str(tmp_path / "saved")))
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("dpo", ["adapter=lora", TOKENS]),
        ("kto", ["adapter=lora", TOKENS]),
        ("dpo", ["adapter=lora_embeddings"]),
        ("dpo", ["adapter=vera", "loraplus=roles"]),
        ("dpo", ["adapter=dora"]),
    ],
)
def test_continued_adapter_is_compared_with_itself(
    task: str, overrides: list[str], prepared: Make, tmp_path: Path
) -> None:
    first = prepared(*overrides, task=task)
    with torch.no_grad():
        for parameter in first.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained = logits(first.model)
    save_adapter(first.model, first.tokenizer, tmp_path / "saved")
    kept = [override for override in overrides if not override.startswith("adapter=")]
    job = prepared("adapter=existing", f"adapter.path={tmp_path / 'saved'}", *kept, task=task)
    torch.testing.assert_close(logits(job.model), trained, rtol=1e-4, atol=1e-4)
    assert_exact(job, logits(job.model), tmp_path / "run")


@pytest.mark.parametrize("task", ["task=dpo", "experiment=kto", "experiment=orpo"])
def test_adapter_that_cannot_be_copied_is_told_before_anything_is_loaded(
    task: str, compose: Callable[..., Any], checkpoints: Callable[[str], Path]
) -> None:
    """PEFT itself refuses a second adapter of these kinds. ORPO needs none."""
    model = ["model=hub", f"model.path={checkpoints('qwen2')}", task, "data=jsonl", "data.train=unread.jsonl"]
    for overrides, message in (
        (["adapter.bias=all"], "adapter.bias: all trains the base's biases"),
        (["adapter=adalora", "trainer.max_steps=20"], "adapter: PEFT allows one adapter of this kind"),
    ):
        refused: AbstractContextManager[Any] = (
            nullcontext() if "orpo" in task else pytest.raises(ConfigErrors, match=message)
        )
        with refused:
            check_config(compose(*model, *overrides), with_data=False)


def test_resumed_run_compares_with_the_start_of_the_first_one(prepared: Make, tmp_path: Path) -> None:
    first = prepared("adapter=loftq", "quantization=nf4")
    assert_exact(prepared("adapter=loftq", "quantization=nf4", resumed=True), logits(first.model), tmp_path / "run")
