"""The typed config.

The schema has every key that this program reads itself, with unit, range and the reason for the default.

`RunConfig` is registered with Hydra as `run_schema`, so Hydra refuses a mistyped key or a value of the wrong type.
Groups with another library's arguments (`optimizer`, `adapter`, `trainer`, ...) accept any key in this schema.
`loraplus_hydra.check` compares their keys with the signature of the class or function. The keys of such an open group
that this program reads itself are the fields of a class below (`OptimizerConfig`, ...). These classes are never
instantiated, and the defaults are in the YAML files.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any, Dict, List, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from loraplus_hydra.config.command_schemas import (
    ChatConfig,
    EvaluateConfig,
    ExportConfig,
    FinishedRunConfig,
    PredictConfig,
    ReportConfig,
)
from loraplus_hydra.config.outer_values import fix_outer_values
from loraplus_hydra.config.types import COUNT, NOT_NEGATIVE, POSITIVE, WHOLE, Range, field_types, range_

AUTO = "auto"  # value of optimizer.lr
AUTO_LR = "loraplus.auto_lr"  # the resolver that computes the rate for it
COLUMN_SUFFIX = "_column"  # end of the keys in `data` whose value is a column's name
SHARE = Range("a number from 0 to 1", lambda x: 0 <= x <= 1)
PROPER_SHARE = Range("a number above 0 and below 1", lambda x: 0 < x < 1)
DROPOUT = Range("a number from 0 to below 1", lambda x: 0 <= x < 1)
STEPS = Range(
    "a whole number of steps, or a share of all steps between 0 and 1",
    lambda x: (isinstance(x, int) and x >= 1) or 0 < x < 1,
)
BETAS = Range("two or more numbers from 0 to below 1", lambda x: len(x) >= 2 and all(map(DROPOUT.holds, x)))
MAX_STEPS = Range("a whole number from 1 on, or -1 for num_train_epochs", lambda x: x >= 1 or x == -1)
BLOCK = Range("a whole number from 2 on", lambda x: x >= 2)
POSITIVE_LIST = Range(
    "one or more finite numbers above 0 as a list, [1, 4]", lambda x: bool(x) and all(map(POSITIVE.holds, x))
)
SEVERAL = Range("a whole number from 2 on", lambda x: x >= 2)
SEED = Range("a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)  # numpy's
CHECKPOINT = Range("auto or a checkpoint's folder", lambda x: x != "")
FORWARD = Range("auto, lean or plain", lambda x: x in ("auto", "lean", "plain"))
DTYPE = Range("auto, float32, bfloat16 or float16", lambda x: x in ("auto", "float32", "bfloat16", "float16"))
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")  # transformers' names
PROBLEM_TYPE = Range(f"one of {', '.join(PROBLEM_TYPES)}", lambda x: x in PROBLEM_TYPES)


@dataclass
class PublishedRate:
    """Keys of `model.published_rate`: a good rate of lora_B, for `optimizer.lr=auto`."""

    eta_B: float = field(metadata=range_(POSITIVE))  # plain LoRA's rate, or lora_B's of LoRA+
    at_alpha: float = field(metadata=range_(POSITIVE))  # the lora_alpha with which it was found
    source: str  # the paper or page
    task_type: Optional[str] = None  # the rate is for this task.task_type; null = for all
    path: Optional[str] = None  # the rate is for this model.path; null = for all models with the same architecture


@dataclass
class ModelConfig:
    """Keys of `model`, the base model and its tokenizer. Any other key is an error."""

    path: str = MISSING  # a folder, a hub name, or pkg://package/folder
    revision: Optional[str] = None  # hub branch, tag or commit of `path`
    tokenizer: Optional[str] = None  # the tokenizer's folder or hub name; null = the model's
    pad_token: Optional[str] = None  # the padding token; null = the tokenizer's own, or see models/tokenizer.py
    add_tokens: List[str] = field(default_factory=list)  # new tokens, whose embeddings train with the adapter
    dtype: str = field(default="float32", metadata=range_(DTYPE))  # of the frozen weights
    attention: Optional[str] = None  # attn_implementation: eager, sdpa, flash_attention_2; null = transformers decides
    trust_remote_code: bool = False  # true runs Python that comes with the model
    lr: float = field(default=5e-5, metadata=range_(POSITIVE))  # eta_A that suits this model; default of optimizer.lr
    published_rate: Dict[str, Any] = field(default_factory=dict)  # PublishedRate; empty = the rule for causal models
    config: Dict[str, Any] = field(default_factory=dict)  # a named model's architecture, in the keys of its config.json


@dataclass
class TaskConfig:
    """Keys of `task`. Any other key is a parameter of the `examples` function."""

    _target_: str = MISSING  # a transformers.Trainer class, or one derived from it
    args_class: str = MISSING  # its arguments' class, transformers.TrainingArguments or derived from it
    auto_class: str = MISSING  # the transformers class that loads the base model
    task_type: Optional[str] = None  # PEFT's task type: CAUSAL_LM, SEQ_CLS, ...
    examples: str = MISSING  # the function that turns rows into the Trainer's examples
    metric: str = "eval_loss"  # the metric that a sweep optimises and `best` refers to; one of the evaluation's metrics
    greater_is_better: bool = False  # the direction of `metric`
    samples: int = field(default=0, metadata=range_(WHOLE))  # held-out prompts answered before and after training
    sample_tokens: int = field(default=48, metadata=range_(COUNT))  # maximum number of new tokens in such an answer
    args: Dict[str, Any] = field(default_factory=dict)  # arguments that only `args_class` has


@dataclass
class OptimizerConfig:
    """Keys of `optimizer`. Any other key is an argument of the class."""

    _target_: str  # a torch.optim.Optimizer class
    lr: float = field(metadata=range_(POSITIVE))  # eta_A, the rate of lora_A
    weight_decay: float = field(metadata=range_(NOT_NEGATIVE))  # weight decay of the groups that decay


@dataclass
class SchedulerConfig:
    """Keys of `scheduler`. Any other key is an argument of the callable."""

    _target_: str  # transformers.get_..._schedule..., a torch.optim.lr_scheduler class, or your function
    warmup_ratio: float = field(metadata=range_(SHARE))  # share of all steps
    num_warmup_steps: Optional[int] = field(metadata=range_(WHOLE))  # steps; used in place of warmup_ratio


@dataclass
class LoraPlusConfig:
    """Keys of `loraplus`. Each preset has only the keys that its rules use."""

    ratio: float = field(metadata=range_(POSITIVE))  # eta_B / eta_A
    lr_embedding: float = field(metadata=range_(POSITIVE))  # rate of LoRA factors of embeddings
    lr_head: float = field(metadata=range_(POSITIVE))  # rate of a new classification head
    lr_A: float = field(metadata=range_(POSITIVE))  # preset `absolute`: rate of lora_A
    lr_B: float = field(metadata=range_(POSITIVE))  # preset `absolute`: rate of lora_B
    rules: Dict[str, Any]  # name -> rule; the first rule that matches a tensor decides
    extra_rules: Dict[str, Any]  # name -> rule; these come before `rules`


@dataclass
class AdapterConfig:
    """Keys of `adapter`. Any other key is a field of the PEFT config class."""

    _target_: str  # a peft.PeftConfig class
    path: Optional[str]  # an existing adapter to train further: its folder, or a hub name


@dataclass
class QuantizationConfig:
    """Keys of `quantization`. Any other key is an argument of the class. Empty without quantisation."""

    _target_: Optional[str]  # transformers.BitsAndBytesConfig


@dataclass
class DataConfig:
    """Keys of `data`. Any other key is an argument of the callable, or a column's name (`*_column`)."""

    _target_: str  # a callable that returns a datasets.DatasetDict with "train" and "eval"


@dataclass
class TrainerConfig:
    """Keys of `trainer`. Any other key is a field of transformers.TrainingArguments."""

    # number of evaluations without a better task.metric; null = no early stopping
    early_stopping_patience: Optional[int] = field(metadata=range_(COUNT))
    early_stopping_threshold: float = field(metadata=range_(NOT_NEGATIVE))  # smallest change that counts as better
    ema: Optional[float] = field(metadata=range_(PROPER_SHARE))  # decay of the weights' average; null = no average
    resume_from_checkpoint: Optional[str] = field(metadata=range_(CHECKPOINT))
    forward: str = field(metadata=range_(FORWARD))  # how the model computes a batch, see docs/explained/lean.md
    auto_batch: bool  # find the largest batch that fits the memory


@dataclass
class LoggerConfig:
    """Keys of `logger`. Any other key is an argument of the class. Empty without a tracker."""

    _target_: Optional[str]  # a class derived from loraplus_hydra.training.trackers.tracker.Tracker


@dataclass
class RunConfig:
    """One run. Registered as `run_schema`; `conf/run.yaml` extends it."""

    seed: int = field(default=0, metadata=range_(SEED))  # of initialisation, data order and dropout
    # true = resume, or accept a finished job, even if the rows, base weights or tokenizer have changed since
    allow_changed_inputs: bool = False
    forgetting: Optional[str] = None  # rows whose loss is compared with the base model's, see training/forgetting.py
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: Dict[str, Any] = field(default_factory=dict)  # QuantizationConfig + the class's arguments
    adapter: Dict[str, Any] = field(default_factory=dict)  # AdapterConfig + the PEFT config's fields
    optimizer: Dict[str, Any] = field(default_factory=dict)  # OptimizerConfig + the class's arguments
    scheduler: Dict[str, Any] = field(default_factory=dict)  # SchedulerConfig + the callable's arguments
    loraplus: Dict[str, Any] = field(default_factory=dict)  # the keys of LoraPlusConfig that the preset uses
    # `task` has its defaults here, because a task's YAML omits keys that have a suitable default.
    task: Dict[str, Any] = field(default_factory=lambda: asdict(TaskConfig()))  # TaskConfig + parameters of `examples`
    data: Dict[str, Any] = field(default_factory=dict)  # DataConfig + the callable's arguments
    trainer: Dict[str, Any] = field(default_factory=dict)  # TrainerConfig + transformers.TrainingArguments
    logger: Dict[str, Any] = field(default_factory=dict)  # LoggerConfig + the class's arguments


@dataclass
class SweepConfig:
    """Keys of `sweep` in the program's config. Registered as `sweep_schema`."""

    name: Optional[str] = None  # the folder in outputs/sweeps; null = the swept keys and a hash of all other keys
    # Set by the program for the jobs of a sweep: see sweep/plan.py.
    swept: List[str] = field(default_factory=list)  # the keys that the sweep varies
    start: Optional[str] = None  # identifies the start of the sweep that runs the job
    # With halving, the share of its steps after which the job stops
    stop_at: Optional[float] = None


@dataclass
class TuneConfig:
    """Keys of `tune` in the program's config: a search. conf/hparams_search/tune.yaml has the defaults."""

    budget: float = field(metadata=range_(POSITIVE))  # in units of one run's steps
    # values of lora_B's rate; null = as many as the budget allows, around optimizer.lr x loraplus.ratio
    eta_B: Optional[List[float]] = field(metadata=range_(POSITIVE_LIST))
    ratios: Optional[List[float]] = field(metadata=range_(POSITIVE_LIST))  # values of eta_B / eta_A; null = 1, 4 and 16
    seeds: int = field(metadata=range_(SEVERAL))  # number of seeds with which the two finalists are compared


# The groups of a run's config.
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "quantization": QuantizationConfig,
    "adapter": AdapterConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "loraplus": LoraPlusConfig,
    "task": TaskConfig,
    "data": DataConfig,
    "trainer": TrainerConfig,
    "logger": LoggerConfig,
}
RUN_GROUPS = tuple(GROUPS)
CLOSED_GROUPS = ("model",)

# `resume`: each group has overrides of the run's keys.
ResumeConfig = make_dataclass(
    "ResumeConfig",
    [(group, Dict[str, Any], field(default_factory=dict)) for group in GROUPS if group != "model"],
    bases=(FinishedRunConfig,),
    namespace={"__module__": __name__},  # so that it can be pickled
)

SCHEMAS: dict[str, type] = {
    "run_schema": RunConfig,
    "sweep_schema": SweepConfig,
    "report_schema": ReportConfig,
    "export_schema": ExportConfig,
    "predict_schema": PredictConfig,
    "chat_schema": ChatConfig,
    "evaluate_schema": EvaluateConfig,
    "resume_schema": ResumeConfig,
}

# Keys of the trainer group that are not fields of TrainingArguments.
NOT_TRAINING_ARGUMENTS = ("early_stopping_patience", "early_stopping_threshold", "ema", "forward", "auto_batch")

NOT_OF_A_RUN = ("hydra", "sweep", "halving", "tune")  # nodes of the program's config that a run's config doesn't have

# Types and ranges of other libraries' parameters, because their signatures give no range.
LIBRARY_RANGES: dict[str, tuple[Any, Range]] = {
    "adapter.r": (int, COUNT),
    "adapter.lora_alpha": (float, POSITIVE),
    "adapter.lora_dropout": (float, DROPOUT),
    "optimizer.betas": (List[float], BETAS),
    "optimizer.momentum": (float, DROPOUT),
    "task.args.max_length": (Optional[int], COUNT),
    "task.problem_type": (Optional[str], PROBLEM_TYPE),
    "task.max_length": (Optional[int], COUNT),
    "task.block_size": (int, BLOCK),
    "data.eval_fraction": (float, PROPER_SHARE),
    "data.max_samples": (Optional[int], COUNT),
    "trainer.num_train_epochs": (float, POSITIVE),
    "trainer.max_steps": (int, MAX_STEPS),
    "trainer.per_device_train_batch_size": (int, COUNT),
    "trainer.per_device_eval_batch_size": (int, COUNT),
    "trainer.gradient_accumulation_steps": (int, COUNT),
    "trainer.max_grad_norm": (float, NOT_NEGATIVE),
    "trainer.logging_steps": (float, STEPS),
    "trainer.eval_steps": (Optional[float], STEPS),
    "trainer.save_steps": (float, STEPS),
    "trainer.save_total_limit": (Optional[int], COUNT),
    "trainer.dataloader_num_workers": (int, WHOLE),
}


@functools.cache
def value_ranges() -> dict[str, tuple[Any, Range]]:
    """Return {dotted key: (type, range)} for every key of a run's config that has a range."""
    ours = {"": RunConfig, **{f"{name}.": schema for name, schema in GROUPS.items()}}
    own = {
        prefix + name: (annotation, limits)
        for prefix, schema in ours.items()
        for name, (annotation, limits) in field_types(schema).items()
        if limits is not None
    }
    return own | LIBRARY_RANGES


def register() -> None:
    """Register the schemas with Hydra. A second call changes nothing."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        if f"{name}.yaml" not in store.repo:
            store.store(name=name, node=node, provider="loraplus_hydra")


def run_of(root: DictConfig) -> DictConfig:
    """Return the part of the program's config that describes the run.

    `root` may also be a node of another repository's config. Raises ConfigErrors if an interpolation in it has no value
    there.
    """
    run = OmegaConf.masked_copy(root, [str(key) for key in root if key not in NOT_OF_A_RUN])
    if root._get_parent() is not None:
        fix_outer_values(run, root)
    _columns_as_text(run.get("data"))
    _published_rate(run.get("optimizer"))
    return run


def _published_rate(optimizer: Any) -> None:
    """Replace `optimizer.lr=auto` with an interpolation, which `models.published_rate` computes."""
    if not isinstance(optimizer, DictConfig) or "lr" not in optimizer:
        return
    is_plain = not (OmegaConf.is_missing(optimizer, "lr") or OmegaConf.is_interpolation(optimizer, "lr"))
    if is_plain and optimizer.lr == AUTO:
        optimizer.lr = f"${{{AUTO_LR}:}}"


def _columns_as_text(data: Any) -> None:
    """Turn numbers given as column names into text.

    Hydra reads the override `data.label_column=1` as a number.
    """
    if not isinstance(data, DictConfig):
        return
    for key in map(str, data):
        is_plain = not (OmegaConf.is_missing(data, key) or OmegaConf.is_interpolation(data, key))
        if key.endswith(COLUMN_SUFFIX) and is_plain and type(data[key]) is int:
            data[key] = str(data[key])
