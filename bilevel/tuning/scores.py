"""Losses and scores of predictions on the host."""

import numpy as np

from bilevel.tuning.data import Table


def scores(table: Table, prediction: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    """Test scores of predicted values (ridge) or class log-probabilities.

    The loss is half the mean squared error, or the mean cross-entropy.
    """
    if table.classes is None:
        loss = 0.5 * float(np.mean(np.square(prediction - y)))
        spread = float(np.mean(np.square(y - y.mean())))
        return {"test_loss": loss, "test_r2": 1 - 2 * loss / spread if spread > 0 else None}
    loss = -float(np.mean(prediction[np.arange(len(y)), y]))
    return {"test_loss": loss, "test_accuracy": float(np.mean(prediction.argmax(axis=1) == y))}


def log_probabilities(f: np.ndarray, task: str) -> np.ndarray:
    """Class log-probabilities of a linear predictor; the prediction itself for ridge."""
    if task == "ridge":
        return f[:, 0]
    f = np.concatenate([np.zeros_like(f), f], axis=1) if task == "logistic" else f
    return f - np.logaddexp.reduce(f, axis=1, keepdims=True)


def cross_entropy(f: np.ndarray, y: np.ndarray, smoothing: float = 0.0) -> float:
    """Mean cross-entropy of the linear predictors of all classes.

    `smoothing` moves that share of each label to all classes evenly.
    """
    log_p = log_probabilities(f, "softmax")
    hit = np.mean(log_p[np.arange(len(y)), y])
    return max(-float((1 - smoothing) * hit + smoothing * np.mean(log_p)), 0.0)
