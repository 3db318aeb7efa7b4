"""Settings that keep other libraries' messages from the screen.

Most of their warnings stay in the log file.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

# The libraries read these when they are imported. A value that the user has set is kept.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # otherwise TRL reports each use of a Trainer
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # the screen has one bar, for training
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # otherwise each failed request to the hub is a warning
    "TOKENIZERS_PARALLELISM": "false",  # otherwise each fork of a data loader is a warning
}

# A line of transformers' report on loading: the tensor's name, colours aside, and what happened to it
_REPORTED = re.compile(r"^(\S+)\s*\|.*(?:MISSING|MISMATCH|UNEXPECTED|CONVERSION)", re.MULTILINE)


def quiet_libraries() -> None:
    """Set the environment that keeps other libraries quiet. Call it before they are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # If the hub's library is already imported, it has read the environment before.
    if "datasets" in sys.modules and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        sys.modules["datasets"].disable_progress_bars()
    for name in ("httpx", "httpx2"):  # otherwise each request to the hub is a line on the screen
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*'pin_memory' argument is set as true but no accelerator")
    # Only the authors of the Hugging Face libraries can fix deprecations inside these libraries.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|datasets)\b")


def quiet_loading() -> None:
    """Switch off the progress bars that transformers shows while it reads and writes weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Ignore PEFT's warnings about settings that need no action."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT corrects it
        warnings.filterwarnings("ignore", message="lora with eva initialization used")  # the rows fit the memory anyway
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # `export` handles it
        yield


@contextmanager
def quiet_new_head(heads: Collection[str]) -> Iterator[None]:
    """Silence transformers' report on loading if it names only layers of `heads`.

    A classifier's head is not in the base model: it is new, or comes with the adapter.
    """

    def names_others(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        keys = _REPORTED.findall(text)
        return "LOAD REPORT" not in text or not keys or any(key.split(".")[0] not in heads for key in keys)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(names_others)
    try:
        yield
    finally:
        logger.removeFilter(names_others)


@contextmanager
def quiet_step_mismatch() -> Iterator[None]:
    """Silence transformers' warning that a checkpoint was saved with other step settings."""
    # It compares a share of all steps, such as save_steps=0.25, with the number of steps that the checkpoint stores
    # instead.
    logger = logging.getLogger("transformers.trainer_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
