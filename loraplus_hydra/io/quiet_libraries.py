"""Other libraries' chatter, kept off the screen; most of their warnings are in the log file."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Read by the libraries when they are imported, so set before. A value that the user has set stays.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL reports each Trainer's use otherwise
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # the screen has one bar, the training's
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # warns of each try to reach the hub otherwise, on the screen and in the log
    "TOKENIZERS_PARALLELISM": "false",  # warns at each fork of a data loader otherwise
}


def quiet_libraries() -> None:
    """Set the environment that keeps other libraries quiet; call it before they are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message=r".*'pin_memory' argument is set as true but no accelerator")
    # Deprecations inside the Hugging Face libraries are for their authors to act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|datasets)\b")


def quiet_loading() -> None:
    """Switch the progress bars off that transformers draws while it reads or writes weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings of what is put right by itself, or by `export` (tied embeddings)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


@contextmanager
def quiet_step_mismatch() -> Iterator[None]:
    """Without transformers' warning that a share of the steps (0.25) isn't the number that a checkpoint has it as."""
    logger = logging.getLogger("transformers.trainer_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
