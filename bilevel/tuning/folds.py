"""The bilevel problem of a table: inner = training parts of the folds, outer = their held-out parts."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import bilevel as bl
from bilevel.tuning import engines, penalties
from bilevel.tuning.data import Table
from bilevel.tuning.models import MODELS, FoldBatch, Rule, init_weights
from bilevel.tuning.scaling import mean_and_scale
from bilevel.tuning.splits import TuneSplit

BOUNDS = (1e-6, 1e4)
"""Range of the penalties that are looked at, for features of unit variance."""


class Folds:
    """Data of all folds and of the refit, and solves at given penalties.

    Features are put on the scale of all training rows first, for conditioning only: the standardisation
    inside each fold comes after it and undoes it. A regression target has mean 0 and variance 1 in each
    training part; held-out losses are in units of the variance over all training rows.
    """

    def __init__(self, table: Table, split: TuneSplit, model: str) -> None:
        self.table, self.split = table, split
        self.model = MODELS[model]
        self.task = model
        self.num_folds = split.num_folds
        self.num_outputs = 1
        if model == "softmax":
            assert table.classes is not None
            self.num_outputs = len(table.classes)
        X, y = table.X[split.train], table.y[split.train]
        self.num_rows, self.num_features = X.shape
        self.mean, self.scale = mean_and_scale(X)
        self.X = jnp.asarray((X - self.mean) / self.scale)
        inside = [split.fold != k for k in range(split.num_folds)]
        self.parts = [*inside, np.ones(len(y), bool)]
        """Rows of each training part; the last part is all rows, for the refit."""
        y_moments = [
            (0.0, 1.0) if table.classes is not None else _moments(y[i]) for i in self.parts
        ]
        self.y_mean, self.y_scale = y_moments[-1]
        self._training = [
            self._batch(X, y, part, part, moments)
            for part, moments in zip(self.parts, y_moments, strict=True)
        ]
        held_out = []
        for part, moments in zip(inside, y_moments[:-1], strict=True):
            batch = self._batch(X, y, part, ~part, moments)
            batch["weight"] *= np.square(moments[1] / self.y_scale)
            held_out.append(batch)
        self._inner = _stack(self._training[:-1])
        self._outer = _stack(held_out)

    def _batch(
        self, X: np.ndarray, y: np.ndarray, part: np.ndarray, rows: np.ndarray, moments: Any
    ) -> dict[str, np.ndarray]:
        """The rows `rows` for a model fitted on the rows `part`: one fold of a `FoldBatch`."""
        mean, scale = mean_and_scale(X[part])
        weight = rows / rows.sum()
        if self.task == "ridge":
            y = (y - moments[0]) / moments[1]
        elif self.task == "logistic":
            y = y.astype(np.float64)
        shift, ratio = (mean - self.mean) / self.scale, self.scale / scale
        return {"y": y, "weight": weight, "shift": shift, "ratio": ratio}

    def problem(self, rule: Rule) -> bl.Problem:
        """Cross-validation: all folds, penalties by `rule`."""
        return bl.Problem(
            self.model.inner,
            self.model.outer,
            FoldBatch(self.X, **self._inner, rule=rule),
            FoldBatch(self.X, **self._outer, rule=rule),
        )

    def start(self, num_folds: int | None = None) -> Any:
        """Zero weights."""
        num_folds = self.num_folds if num_folds is None else num_folds
        return init_weights(num_folds, self.num_features, self.num_outputs)

    def solve(self, theta: Any, rule: Rule, w: Any, tol: float | None = None) -> tuple[float, Any]:
        """Held-out loss in the units of the target, without the prior, and the weights.

        Of a converged inner solve, however an engine left it; to a residual of `tol`, where given.
        """
        rule = rule._replace(weight=jnp.zeros_like(rule.weight))
        value, w = engines.solve_in_search(self.problem(rule), theta, w, tol)
        return float(value) * self.y_scale**2, w

    def curve(
        self, grid: np.ndarray, rule: Rule | None = None, tol: float | None = None
    ) -> tuple[np.ndarray, Any]:
        """Held-out losses over single penalties, and the weights at the best.

        Solved from the strongest penalty to the weakest, each from the solution before. A `rule` with a
        level to set gives the shapes of a search's rule, whose program then serves.
        """
        if rule is None:
            rule = penalties.single(self.num_features, self.num_rows)
        values = np.empty(len(grid))
        w = best = self.start()
        for i in np.argsort(-grid):
            theta = np.log(grid[i]) * penalties.line(rule)
            values[i], w = self.solve(theta, rule, w, tol)
            if values[i] <= np.min(values[grid >= grid[i]]):
                best = w
        return values, best

    def fit_part(self, part: int, penalty: Any, tol: float | None = None) -> dict[str, np.ndarray]:
        """A fit on one training part (-1: all rows) alone, from zero: `coef` (d, C), `intercept` (C,).

        Nothing outside the part reaches it, not even the rounding or the number of steps of a joint
        solve. Coefficients are those of standardised features and, for ridge, of a target of variance 1.
        `penalty` is one number or (d,).
        """
        rule = penalties.fixed(penalty, self.num_features)
        batch = FoldBatch(self.X, **_stack([self._training[part]]), rule=rule)
        # The outer value is not wanted here.
        problem = bl.Problem(self.model.inner, self.model.outer, batch, batch)
        _, w = engines.solve(problem, jnp.ones(1), self.start(1), tol)
        # `models.coefficients` on the host.
        coef = (
            np.asarray(w["coef"])[0]
            / np.sqrt(1 + np.broadcast_to(penalty, (self.num_features,)))[:, None]
        )
        return {"coef": coef, "intercept": np.asarray(w["intercept"])[0]}

    def statistics(self, part: int, penalty: float) -> np.ndarray:
        """`penalties.relative_penalties` of one training part (-1: all rows), (2, d).

        The pilot fit behind the ridge statistic has one penalty for all features.
        """
        rows = self.split.train[self.parts[part]]
        y = self.table.y[rows]
        outputs = np.eye(self.num_outputs)[y] if self.task == "softmax" else y[:, None]
        return penalties.relative_penalties(
            penalties.score_statistic(self.table.X[rows], outputs),
            penalties.ridge_statistic(self.fit_part(part, penalty, tol=1e-4)["coef"]),
        )


def _stack(parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Fields of all folds, fold first."""
    return {name: jnp.asarray(np.stack([part[name] for part in parts])) for name in parts[0]}


def _moments(y: np.ndarray) -> tuple[float, float]:
    return float(y.mean()), float(y.std())


def raw_model(folds: Folds, fit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A fit on all rows in the features' and the target's own units, `X @ coef + intercept`."""
    coef = fit["coef"] / folds.scale[:, None] * folds.y_scale
    intercept = fit["intercept"] * folds.y_scale + folds.y_mean - folds.mean @ coef
    return {"coef": coef, "intercept": intercept}
