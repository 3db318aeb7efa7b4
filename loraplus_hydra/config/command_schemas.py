"""The keys of the commands that read a stored run or a sweep.

`resume`, which has a run's groups, is in `schema`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from omegaconf import MISSING

from loraplus_hydra.config.types import COUNT, NOT_NEGATIVE, Range, range_

TOP_P = Range("a number above 0 and at most 1", lambda x: 0 < x <= 1)


@dataclass
class FinishedRunConfig:
    """Keys of every command that reads a stored run."""

    run: str = MISSING  # the run's folder
    trust_remote_code: bool = False  # true runs Python that came with the run's model
    allow_changed_inputs: bool = False  # true = the run's base weights, adapter or rows may have changed since
    model: Dict[str, Any] = field(default_factory=dict)  # overrides of the run's `model` keys: model.path=...


@dataclass
class OpenedRunConfig(FinishedRunConfig):
    """Keys of the commands that open a run's adapter."""

    checkpoint: Optional[str] = None  # newest, or a step; null = the adapter of a finished run
    ema: bool = False  # true = the average of the weights (trainer.ema), adapter_ema/


@dataclass
class ExportConfig(OpenedRunConfig):
    """`export`. Registered as `export_schema`."""

    to: Optional[str] = None  # the new folder; null = a folder in `export` in the run's folder
    target: Optional[str] = None  # hf, vllm, llama_cpp or ollama; null = plain files, without a check
    merge: Optional[bool] = (
        None  # true = the merged model, false = the adapter alone; null = what the target usually takes
    )
    dtype: Optional[str] = None  # dtype of a merged model's weights: float32, bfloat16, float16; null = as in the run
    push: Optional[str] = None  # owner/name of a hub's repository; null = nothing is sent
    private: bool = True  # false = the pushed repository is open to everyone


@dataclass
class AnsweringConfig(OpenedRunConfig):
    """Keys of the commands that let a run's model answer."""

    temperature: float = field(default=0.0, metadata=range_(NOT_NEGATIVE))  # of sampling; 0 = the likeliest tokens
    top_p: float = field(default=1.0, metadata=range_(TOP_P))  # tokens with this share of the probability are sampled


@dataclass
class ChatConfig(AnsweringConfig):
    """`chat`. Registered as `chat_schema`."""

    system: Optional[str] = None  # the system prompt
    max_new_tokens: int = field(default=512, metadata=range_(COUNT))  # maximum number of tokens in an answer


@dataclass
class PredictConfig(AnsweringConfig):
    """`predict`. Registered as `predict_schema`."""

    text: Optional[str] = None  # one text
    text_pair: Optional[str] = None  # a classifier's second text
    file: Optional[str] = None  # a file of texts: JSONL, CSV, Parquet, or one text per line
    column: Optional[str] = None  # the file's column with the text; null = the column of the run's rows
    out: Optional[str] = None  # a new JSONL file for the answers; null = the screen
    max_new_tokens: int = field(default=128, metadata=range_(COUNT))  # maximum number of tokens in an answer
    batch_size: Optional[int] = field(default=None, metadata=range_(COUNT))  # texts computed together; null = decided
    scores: bool = False  # true = a classifier's scores of all labels on the screen, too


@dataclass
class EvaluateConfig(OpenedRunConfig):
    """`evaluate`. Registered as `evaluate_schema`."""

    data: Dict[str, Any] = field(default_factory=dict)  # overrides of the run's `data` keys, or another option
    trainer: Dict[str, Any] = field(default_factory=dict)  # overrides of the run's `trainer` keys
    out: Optional[str] = None  # a new JSON file for the metrics; null = only the screen
    forgetting: Optional[str] = None  # rows whose loss is compared with the base model's
    harness: List[str] = field(default_factory=list)  # tasks of lm-evaluation-harness, instead of the rows
    harness_tasks: Optional[str] = None  # a folder with the YAML files of more tasks
    harness_limit: Optional[int] = field(default=None, metadata=range_(COUNT))  # rows of each task; null = all
    harness_batch_size: int = field(default=8, metadata=range_(COUNT))  # rows that are computed together
    harness_chat: bool = False  # true = the tasks' prompts become turns in the run's chat template


@dataclass
class ReportConfig:
    """`report`. Registered as `report_schema`."""

    folder: str = MISSING  # the sweep's folder, which contains the jobs' folders
    watch: bool = False  # true = write the page again while the sweep runs
