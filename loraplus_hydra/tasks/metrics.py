"""Metrics of a classifier's predictions, computed by scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

# The metrics that an evaluation reports in addition to eval_loss -> True if a larger value is better.
METRICS: dict[str, dict[str, bool]] = {
    SINGLE: {"eval_accuracy": True, "eval_f1": True, "eval_matthews": True},
    MULTI: {"eval_accuracy": True, "eval_f1": True, "eval_f1_macro": True},
    REGRESSION: {"eval_pearson": True, "eval_spearman": True, "eval_mae": False, "eval_mse": False},
}


def metrics_of(problem_type: str) -> Callable[[Any], dict[str, float]]:
    """Return the Trainer's `compute_metrics` for a `problem_type` of transformers."""
    return {SINGLE: single_label, MULTI: multi_label, REGRESSION: regression}[problem_type]


def single_label(evaluated: Any) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' phi.

    For two labels F1 is that of the second label, as in GLUE. For more labels it is the mean over all labels.
    """
    logits, labels = _logits(evaluated), evaluated.label_ids
    predicted = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    varied = len({*predicted.tolist(), *labels.tolist()}) > 1  # for constant values phi is 0, but scikit-learn warns
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predicted)) if varied else 0.0,
    }


def multi_label(evaluated: Any) -> dict[str, float]:
    """Return accuracy, F1 over all decisions, and the mean of the labels' F1.

    Accuracy is the share of rows whose labels are all right. A label is predicted if its probability is 1/2 or more.
    """
    predicted, labels = _logits(evaluated) > 0, evaluated.label_ids > 0.5
    return {
        "accuracy": float((predicted == labels).all(axis=-1).mean()),
        "f1": float(f1_score(labels, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


def regression(evaluated: Any) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, mean absolute error and mean squared error.

    The correlations are 0 if the predictions or the labels are constant.
    """
    predicted = _logits(evaluated).reshape(-1).astype(np.float64)
    labels = evaluated.label_ids.reshape(-1).astype(np.float64)
    # For constant values both correlations are undefined, and scipy warns.
    varied = len(predicted) > 1 and predicted.std() > 0 and labels.std() > 0
    return {
        "pearson": float(pearsonr(predicted, labels).statistic) if varied else 0.0,
        "spearman": float(spearmanr(predicted, labels).statistic) if varied else 0.0,
        "mae": float(np.abs(predicted - labels).mean()),
        "mse": float(((predicted - labels) ** 2).mean()),
    }


def _logits(evaluated: Any) -> np.ndarray:
    predictions = evaluated.predictions
    # If a model returns more than logits, the predictions are a tuple.
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
