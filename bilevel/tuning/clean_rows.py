"""The rows of label cleaning: scaled features, labels, folds of the trusted examples."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import bilevel as bl
from bilevel.tuning import engines
from bilevel.tuning.clean_models import (
    TrustedRows,
    WeightedRows,
    init_weights,
    trusted_outer,
    weighted_inner,
)
from bilevel.tuning.data import Table
from bilevel.tuning.splits import CleanSplit

LEARNING_PENALTY = 0.2
"""Penalty of the model through which the weights are learned, for features of mean variance 1.

Strong, so that the model cannot memorise wrong labels. It matters little: on digits .05 and 1 give the
same accuracy (`benchmarks/cleaning.py --learning-penalty 1`). As a second outer variable it goes to zero,
since a thousand weights and a weak penalty fit the trusted examples perfectly.
"""

MAX_FOLDS = 4
"""Folds of the trusted examples on which the penalty of the refit is chosen."""


class Rows:
    """Training rows followed by trusted rows, scaled, with the folds of the trusted ones."""

    def __init__(self, table: Table, split: CleanSplit, labels: np.ndarray, seed: int) -> None:
        from sklearn.model_selection import StratifiedKFold

        assert table.classes is not None
        self.num_train, self.num_trusted = len(split.train), len(split.trusted)
        self.mean, self.scale = range_scale(table.X[split.train])
        rows = np.concatenate([split.train, split.trusted])
        self.X = (table.X[rows] - self.mean) / self.scale
        self.y = np.concatenate([labels, table.y[split.trusted]])
        self.trusted_y = table.y[split.trusted]
        self.start = init_weights(table.X.shape[1], len(table.classes))
        self.num_folds = min(MAX_FOLDS, int(np.bincount(self.trusted_y).min()))
        self.fold = np.empty(self.num_trusted, np.int64)
        folder = StratifiedKFold(self.num_folds, shuffle=True, random_state=seed)
        for fold, (_, part) in enumerate(folder.split(self.trusted_y, self.trusted_y)):
            self.fold[part] = fold

    def problem(self, used: np.ndarray) -> bl.Problem:
        """Weights of the training rows, judged on the trusted rows in use."""
        n = self.num_train
        return bl.Problem(
            weighted_inner,
            trusted_outer,
            self._weighted(slice(n), self.y, n, LEARNING_PENALTY),
            self._trusted(used),
        )

    def fit(
        self, weights: np.ndarray, penalty: float, w: Any, *, y: np.ndarray | None = None
    ) -> Any:
        """Weights of the model for given weights of all rows (training, then trusted)."""
        count = float(np.count_nonzero(weights))
        problem = bl.Problem(
            weighted_inner,
            trusted_outer,
            self._weighted(slice(None), self.y if y is None else y, count, penalty),
            self._trusted(np.ones(self.num_trusted, bool)),
        )
        return engines.solve(problem, jnp.asarray(weights), w)[1]

    def _weighted(self, rows: slice, y: np.ndarray, count: float, penalty: float) -> WeightedRows:
        return WeightedRows(
            jnp.asarray(self.X[rows]),
            jnp.asarray(y[rows]),
            jnp.asarray(float(count)),
            jnp.asarray(float(penalty)),
        )

    def _trusted(self, used: np.ndarray) -> TrustedRows:
        return TrustedRows(
            jnp.asarray(self.X[self.num_train :]),
            jnp.asarray(self.trusted_y),
            jnp.asarray(used / used.sum()),
        )

    def predictor(self, w: Any) -> np.ndarray:
        """Linear predictor of all rows (training, then trusted)."""
        return self.X @ np.asarray(w["coef"]) + np.asarray(w["intercept"])


def range_scale(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each column, and its range times one number that makes the mean variance 1.

    A standard deviation would blow up columns that are almost always the same (the border pixels
    of an image), and these are where a fit to wrong labels goes.
    """
    span = np.ptp(X, axis=0)
    span = np.where(span > 0, span, 1.0)
    return X.mean(axis=0), span * np.sqrt(np.mean(np.var(X / span, axis=0)))
