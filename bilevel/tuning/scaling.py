"""Standardisation."""

import numpy as np


def mean_and_scale(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; 1 for a column that is constant up to rounding."""
    mean, scale = X.mean(axis=0), X.std(axis=0)
    rounding = 10 * np.finfo(np.float64).eps * np.abs(X).max(axis=0)
    return mean, np.where(scale <= rounding, 1.0, scale)
