"""Metrics of a classifier's predictions, by scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

# What the evaluation reports besides eval_loss, and whether more is better.
METRICS: dict[str, dict[str, bool]] = {
    SINGLE: {"eval_accuracy": True, "eval_f1": True, "eval_matthews": True},
    MULTI: {"eval_accuracy": True, "eval_f1": True, "eval_f1_macro": True},
    REGRESSION: {"eval_pearson": True, "eval_spearman": True, "eval_mae": False, "eval_mse": False},
}


def metrics_of(problem_type: str) -> Callable[[Any], dict[str, float]]:
    """The `compute_metrics` of a transformers Trainer for a kind of labels (transformers' name for it)."""
    return {SINGLE: single_label, MULTI: multi_label, REGRESSION: regression}[problem_type]


def single_label(evaluated: Any) -> dict[str, float]:
    """Accuracy, F1 (of the second of two labels, as GLUE has it; of more the mean over all) and Matthews' phi."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    logits, labels = _logits(evaluated), evaluated.label_ids
    found = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    varied = len({*found.tolist(), *labels.tolist()}) > 1  # without, phi is 0 and scikit-learn warns
    return {
        "accuracy": float((found == labels).mean()),
        "f1": float(f1_score(labels, found, average=average, zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, found)) if varied else 0.0,
    }


def multi_label(evaluated: Any) -> dict[str, float]:
    """Share of rows with every label right, F1 over all decisions, and the mean of the labels' F1.

    A label is given from probability 1/2 on.
    """
    from sklearn.metrics import f1_score

    found, labels = _logits(evaluated) > 0, evaluated.label_ids > 0.5
    return {
        "accuracy": float((found == labels).all(axis=-1).mean()),
        "f1": float(f1_score(labels, found, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(labels, found, average="macro", zero_division=0)),
    }


def regression(evaluated: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation (0 where one side is constant), mean absolute and mean squared error."""
    from scipy.stats import pearsonr, spearmanr

    found, labels = (
        _logits(evaluated).reshape(-1).astype(np.float64),
        evaluated.label_ids.reshape(-1).astype(np.float64),
    )
    # Both are undefined without variation, and scipy warns then.
    varied = len(found) > 1 and found.std() > 0 and labels.std() > 0
    return {
        "pearson": float(pearsonr(found, labels).statistic) if varied else 0.0,
        "spearman": float(spearmanr(found, labels).statistic) if varied else 0.0,
        "mae": float(np.abs(found - labels).mean()),
        "mse": float(((found - labels) ** 2).mean()),
    }


def _logits(evaluated: Any) -> np.ndarray:
    """The logits: models that return more than these give a tuple."""
    predictions = evaluated.predictions
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
