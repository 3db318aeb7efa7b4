"""The plan of a config's parameter groups, and the memory of training, for `inspect`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig
from peft import LoraConfig
from transformers import PretrainedConfig

from loraplus_hydra.check import Checked
from loraplus_hydra.config.plain import plain_of
from loraplus_hydra.errors import UserError
from loraplus_hydra.io import processes
from loraplus_hydra.loraplus.advice import optimizer_note, published_product, rate_advice, setting_notes
from loraplus_hydra.loraplus.invariance import explain, rates_of
from loraplus_hydra.loraplus.memory import Memory, estimate
from loraplus_hydra.loraplus.plan import Plan, table_rows
from loraplus_hydra.loraplus.scale_free import is_adam
from loraplus_hydra.models.eva import awaits_directions
from loraplus_hydra.models.published_rate import auto_rate
from loraplus_hydra.models.tokenizer import load_tokenizer
from loraplus_hydra.training.hf_trainer.step_memory import StepMemory, step_memory
from loraplus_hydra.training.measure import count_parameters
from loraplus_hydra.training.prepare import prepare_examples


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` shows about a config."""

    plan: Plan
    memory: Memory
    trained: int  # number of trained parameters
    total: int
    step: StepMemory
    advice: tuple[str, ...]
    explanation: tuple[str, ...]  # lines on rates, decay and the equal run of plain LoRA

    def as_dict(self) -> dict[str, Any]:
        """Return the inspection as a dict of JSON values."""
        return {
            "rows": [asdict(row) for row in table_rows(self.plan)],  # the table of rates
            "tensors": [  # each trained tensor, as in param_groups.json, with the reason for its rate
                {
                    **tensor.as_dict(),
                    "owner": tensor.record.owner,
                    "state_bits": None if tensor.state is None else tensor.state.bits,
                    "why": tensor.reason(),
                }
                for tensor in self.plan.tensors
            ],
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},  # memory of each part of training
            "step_memory": asdict(self.step),  # memory of a step's activations
            "trained_parameters": self.trained,  # number of trained parameters
            "total_parameters": self.total,  # number of all parameters
            "advice": list(self.advice),  # warnings on the rates
            "explanation": list(self.explanation),  # lines on rates, decay and the equal run of plain LoRA
        }


def inspect(checked: Checked) -> Inspection:
    """Return everything that `inspect` shows about a checked config."""
    plan = checked.plan
    trained, total = count_parameters(checked.model)
    memory, step = estimate_memory(checked, step_memory(checked.config))
    shown = (checked.config, plan, checked.model)
    return Inspection(plan, memory, trained, total, step, advice_of(*shown), explanation_of(*shown))


def memory_on_own_rows(checked: Checked) -> tuple[Memory, StepMemory]:
    """Estimate the memory of training on the longest of the config's own rows."""
    tokenizer = load_tokenizer(checked.config.model)
    return estimate_memory(checked, step_memory(checked.config, prepare_examples(checked.config, tokenizer), tokenizer))


def estimate_memory(checked: Checked, step: StepMemory) -> tuple[Memory, StepMemory]:
    """Return the memory of all parts of training, with that of a step."""
    config = checked.config
    memory = estimate(checked.model, checked.plan, plain_of(config.quantization))
    return replace(memory, activations=None if step.taken is None else max(0, step.taken - memory.gradients)), step


def advice_of(config: DictConfig, plan: Plan, model: Any) -> tuple[str, ...]:
    """Return warnings about rates that do not suit the adapter's initialisation or the model's width."""
    adapter = model.active_peft_config
    rates = rates_of(plan, adapter) if isinstance(adapter, LoraConfig) else None
    published = None
    base = getattr(model, "config", None)
    by_adam = is_adam(_optimizer_name(config))
    # The rule is for causal language models and Adam.
    if isinstance(base, PretrainedConfig) and config.task.task_type == "CAUSAL_LM" and by_adam:
        text = base.get_text_config()
        width = getattr(text, "hidden_size", None)
        published = None if width is None else published_product(text.model_type, width)
    product = None if rates is None else rates.alpha_eta_b
    return tuple(rate_advice(plan.records, plan.largest_ratio, product, published))


def explanation_of(config: DictConfig, plan: Plan, model: Any) -> tuple[str, ...]:
    """Return lines on the rates, decay and the equal run of plain LoRA; empty for other methods than LoRA."""
    adapter = model.active_peft_config
    if not isinstance(adapter, LoraConfig):
        return ()
    clipping = float(config.trainer.get("max_grad_norm") or 0)
    smallest = [f"scheduler.{key}" for key in ("min_lr", "lr_end") if config.scheduler.get(key)]
    lines = explain(plan, adapter, _optimizer_name(config), clipping, smallest)
    with suppress(UserError):  # nothing is published for this config
        base = getattr(model, "config", None)
        auto = auto_rate(config, base if isinstance(base, PretrainedConfig) else None)
        chosen = "" if config.optimizer.lr == auto.lr else f", where this run has {config.optimizer.lr:g}"
        lines.append(f"optimizer.lr=auto is {auto.lr:g}{chosen} ({auto.source})")
    of_b = sorted({tensor.group.lr for tensor in plan.tensors if tensor.record.role == "lora_B"})
    of_optimizer = optimizer_note(_optimizer_name(config), of_b)
    notes = [*([of_optimizer] if of_optimizer else []), *_notes(config, plan, adapter)]
    if awaits_directions(model):
        notes.append(f"EVA decides the ranks when training begins; until then each layer has rank {adapter.r}")
    return (*lines, *(f"Note: {note}" for note in notes))


def _optimizer_name(config: DictConfig) -> str:
    return str(config.optimizer._target_).rpartition(".")[2]


def _notes(config: DictConfig, plan: Plan, adapter: LoraConfig) -> list[str]:
    """Return notes on settings that change the best rate."""
    trainer = config.trainer
    rows = trainer.get("per_device_train_batch_size", 8) * trainer.get("gradient_accumulation_steps", 1)
    steps = trainer.get("max_steps", -1)
    return setting_notes(
        plan.records,
        rows_per_step=rows * processes.world_size(),
        steps=steps if steps > 0 else None,
        # rsLoRA's scale depends on the rank
        rank=None if adapter.rank_pattern or adapter.use_rslora else adapter.r,
    )
