"""The typed configs of the commands that open a finished run. No torch, nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Optional

from omegaconf import MISSING


@dataclass
class FinishedRunConfig:
    """What every command on a finished run takes."""

    run: str = MISSING  # the run's folder
    trust_remote_code: bool = False  # true runs Python that came with the run's model
    model: Dict[str, Any] = field(default_factory=dict)  # keys of the run's `model` to change: model.path=...


@dataclass
class ExportConfig(FinishedRunConfig):
    """`export`. Registered as `export_schema`."""

    to: Optional[str] = None  # the new folder; null = export/model or export/adapter in the run's
    merge: bool = True  # true = a whole model, false = the adapter alone
    dtype: Optional[str] = None  # of a merged model's weights: float32, bfloat16, float16; null = as in the run


@dataclass
class PredictConfig(FinishedRunConfig):
    """`predict`. Registered as `predict_schema`."""

    text: Optional[str] = None  # one text
    text_pair: Optional[str] = None  # a classifier's second text
    file: Optional[str] = None  # texts in a file: JSONL, CSV, Parquet, or a text a line
    column: Optional[str] = None  # the file's column with the text; null = as the run's rows had it
    out: Optional[str] = None  # a new JSONL file for the answers; null = the screen
    max_new_tokens: int = 128  # tokens of an answer at most; from 1 on
    batch_size: int = 32  # texts that a classifier takes at once; from 1 on


@dataclass
class EvaluateConfig(FinishedRunConfig):
    """`evaluate`. Registered as `evaluate_schema`."""

    data: Dict[str, Any] = field(default_factory=dict)  # keys of the run's `data` to change, or another option
    trainer: Dict[str, Any] = field(default_factory=dict)  # keys of the run's `trainer` to change
    out: Optional[str] = None  # a new JSON file for the metrics; null = the screen alone


@dataclass
class ResumeConfig(FinishedRunConfig):
    """`resume`. Registered as `resume_schema`. Each group holds the keys of the run's own to change."""

    quantization: Dict[str, Any] = field(default_factory=dict)
    adapter: Dict[str, Any] = field(default_factory=dict)
    optimizer: Dict[str, Any] = field(default_factory=dict)
    scheduler: Dict[str, Any] = field(default_factory=dict)
    loraplus: Dict[str, Any] = field(default_factory=dict)
    task: Dict[str, Any] = field(default_factory=dict)
    data: Dict[str, Any] = field(default_factory=dict)
    trainer: Dict[str, Any] = field(default_factory=dict)
    logger: Dict[str, Any] = field(default_factory=dict)


@dataclass
class ReportConfig:
    """`report`. Registered as `report_schema`."""

    folder: str = MISSING  # the folder that holds the jobs' folders


COMMAND_SCHEMAS: dict[str, type] = {
    "report_schema": ReportConfig,
    "export_schema": ExportConfig,
    "predict_schema": PredictConfig,
    "evaluate_schema": EvaluateConfig,
    "resume_schema": ResumeConfig,
}
