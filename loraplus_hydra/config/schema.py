"""The typed config: every key that this project reads itself, with its unit, range and default's reason.

`RunConfig` is registered with Hydra as `run_schema`, so a mistyped key or a value of the wrong type is refused when the
config is composed. Groups that hold another library's arguments (`optimizer`, `adapter`, `trainer`, ...) are open
mappings there: `loraplus_hydra.check` compares them with the signature of what they configure. The keys that we read
of an open group are the fields of its class below (`OptimizerConfig`, ...).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from omegaconf import MISSING, DictConfig, OmegaConf

from loraplus_hydra.config.command_schemas import COMMAND_SCHEMAS


@dataclass
class ModelConfig:
    """The base model and its tokenizer. Closed: other keys are errors."""

    path: str = MISSING  # a folder, a hub name, or pkg://package/folder
    revision: Optional[str] = None  # hub branch, tag or commit
    tokenizer: Optional[str] = None  # where the tokenizer lies, if not beside the model
    pad_token: Optional[str] = None  # a token of the tokenizer that pads; null = its own, or see tokenizer.py
    add_tokens: List[str] = field(default_factory=list)  # new tokens, whose embeddings train with the adapter
    dtype: str = "float32"  # of the frozen weights: auto, float32, bfloat16, float16
    attention: Optional[str] = None  # attn_implementation: eager, sdpa, flash_attention_2; null = transformers decides
    trust_remote_code: bool = False  # true runs Python that comes with the model
    lr: float = 5e-5  # eta_A that suits this model; optimizer.lr takes it unless it is set
    config: Dict[str, Any] = field(default_factory=dict)  # a named model's architecture, as its config.json has it


@dataclass
class TaskConfig:
    """What is learnt: the Trainer, its arguments, and how rows become examples. Closed; `args` is the Trainer's own."""

    _target_: str = MISSING  # a transformers.Trainer class, or one derived from it
    args_class: str = MISSING  # its arguments' class, transformers.TrainingArguments or derived from it
    auto_class: str = MISSING  # the transformers class that loads the base model
    task_type: Optional[str] = None  # PEFT's task type: CAUSAL_LM, SEQ_CLS, ...
    examples: str = MISSING  # the function that turns rows into the Trainer's examples
    metric: str = "eval_loss"  # what a sweep optimises and what `best` means; a key of the evaluation's metrics
    greater_is_better: bool = False  # of `metric`
    chat: Optional[bool] = None  # wrap prompt and completion in the chat template; null = when the tokenizer has one
    problem_type: Optional[str] = (
        None  # classification: transformers' name for the kind of labels; null = by the labels
    )
    max_length: Optional[int] = None  # classification: tokens of a row at most; null = as many as the model takes
    block_size: Optional[int] = None  # text: tokens in a block
    samples: int = 0  # held-out prompts answered before and after training
    sample_tokens: int = 48  # new tokens at most in such an answer
    args: Dict[str, Any] = field(default_factory=dict)  # arguments that only this Trainer's arguments class has


@dataclass
class OptimizerConfig:
    """Open: every other key is an argument of the class."""

    _target_: str = MISSING  # a torch.optim.Optimizer class
    lr: float = MISSING  # eta_A, the rate of lora_A; > 0
    weight_decay: float = 0.0  # of the groups that decay; >= 0


@dataclass
class SchedulerConfig:
    """Open: every other key is an argument of the callable."""

    _target_: str = MISSING  # transformers.get_..._schedule..., a torch.optim.lr_scheduler class, or your function
    warmup_ratio: float = 0.0  # share of all steps; 0 to 1
    num_warmup_steps: Optional[int] = None  # steps; stands instead of warmup_ratio


@dataclass
class LoraPlusConfig:
    """Open: each preset has only the keys that its rules use; all of them are checked."""

    ratio: float = 8.0  # eta_B / eta_A; > 0
    lr_embedding: float = 1e-6  # rate of LoRA factors of embeddings; > 0
    rules: Dict[str, Any] = field(default_factory=dict)  # name -> rule; the first that matches a tensor decides
    extra_rules: Dict[str, Any] = field(default_factory=dict)  # the same, ahead of `rules`


@dataclass
class AdapterConfig:
    """Open: every other key is a field of the PEFT config class."""

    _target_: str = MISSING  # a peft.PeftConfig class
    path: Optional[str] = None  # an adapter to train on: its folder, or a hub name


@dataclass
class QuantizationConfig:
    """Open: every other key is an argument of the class. Empty for a base that isn't quantised."""

    _target_: Optional[str] = None  # transformers.BitsAndBytesConfig


@dataclass
class DataConfig:
    """Open: every other key is an argument of the callable; `*_column` keys say what its columns are called."""

    _target_: str = MISSING  # a callable that returns a datasets.DatasetDict with "train" and "eval"


@dataclass
class TrainerConfig:
    """Open: every other key is a field of transformers.TrainingArguments."""

    early_stopping_patience: Optional[int] = None  # evaluations without a better task.metric; null = never stops early
    early_stopping_threshold: float = 0.0  # how much better counts as better; >= 0
    resume_from_checkpoint: Optional[str] = None  # auto, or a checkpoint's folder


@dataclass
class LoggerConfig:
    """Open: every other key is an argument of the class. Empty for a run that nothing tracks."""

    _target_: Optional[str] = None  # a class derived from loraplus_hydra.training.trackers.tracker.Tracker


@dataclass
class RunConfig:
    """One run. Registered as `run_schema`; `conf/run.yaml` extends it."""

    seed: int = 0  # of initialisation, data order and dropout
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: Dict[str, Any] = field(default_factory=dict)  # QuantizationConfig + the class's arguments
    adapter: Dict[str, Any] = field(default_factory=dict)  # AdapterConfig + the PEFT config's fields
    optimizer: Dict[str, Any] = field(default_factory=dict)  # OptimizerConfig + the class's arguments
    scheduler: Dict[str, Any] = field(default_factory=dict)  # SchedulerConfig + the callable's arguments
    loraplus: Dict[str, Any] = field(default_factory=dict)  # keys of LoraPlusConfig, as the preset uses them
    task: TaskConfig = field(default_factory=TaskConfig)
    data: Dict[str, Any] = field(default_factory=dict)  # DataConfig + the callable's arguments
    trainer: Dict[str, Any] = field(default_factory=dict)  # TrainerConfig + transformers.TrainingArguments
    logger: Dict[str, Any] = field(default_factory=dict)  # LoggerConfig + the class's arguments


@dataclass
class SweepConfig:
    """Of the program, not of a run: registered as `sweep_schema`, which `conf/config.yaml` has under `sweep`."""

    name: Optional[str] = None  # of its folder in outputs/sweeps; null = the swept keys and a hash of the rest


# Of the trainer group: what is no field of TrainingArguments.
EARLY_STOPPING = ("early_stopping_patience", "early_stopping_threshold")

# The groups of a run's config.
RUN_GROUPS = (
    *("model", "quantization", "adapter", "optimizer", "scheduler"),
    *("loraplus", "task", "data", "trainer", "logger"),
)

NOT_OF_A_RUN = ("hydra", "sweep")  # what the program's config holds besides the run's

# The open groups and the keys of each that we read ourselves.
OPEN_GROUPS: dict[str, type] = {
    "quantization": QuantizationConfig,
    "adapter": AdapterConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "loraplus": LoraPlusConfig,
    "data": DataConfig,
    "logger": LoggerConfig,
}


def register() -> None:
    """Make the schemas known to Hydra; calling it again changes nothing."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig, provider="loraplus_hydra")
    store.store(name="sweep_schema", node=SweepConfig, provider="loraplus_hydra")
    for name, node in COMMAND_SCHEMAS.items():
        store.store(name=name, node=node, provider="loraplus_hydra")


def run_of(root: DictConfig) -> DictConfig:
    """The run's part of the program's config."""
    return OmegaConf.masked_copy(root, [str(key) for key in root if key not in NOT_OF_A_RUN])
