"""What one would have used instead of `bilevel tune`: scikit-learn on the same splits and folds."""

import warnings
from typing import Any

import numpy as np

from bilevel.tuning.data import Table
from bilevel.tuning.scores import scores
from bilevel.tuning.splits import TuneSplit


def _estimator(task: str, strength: float | None) -> Any:
    """Scaler and model; `strength` is alpha (ridge) or C (logistic), None is the default."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    value = {} if strength is None else {"alpha" if task == "ridge" else "C": strength}
    model = Ridge(**value) if task == "ridge" else LogisticRegression(max_iter=2000, **value)
    return make_pipeline(StandardScaler(), model)


def fit(table: Table, split: TuneSplit, strength: float | None) -> Any:
    """The fitted pipeline on all training rows."""
    return _estimator(table.task, strength).fit(table.X[split.train], table.y[split.train])


def _predict(table: Table, estimator: Any, X: np.ndarray) -> np.ndarray:
    return estimator.predict(X) if table.classes is None else estimator.predict_log_proba(X)


def _report(table: Table, split: TuneSplit, strength: float | None) -> dict[str, Any]:
    """Cross-validated loss, refit on all training rows, test scores."""
    X, y = table.X[split.train], table.y[split.train]
    losses = []
    for fold in range(split.num_folds):
        inside = split.fold != fold
        estimator = _estimator(table.task, strength).fit(X[inside], y[inside])
        held_out = _predict(table, estimator, X[~inside])
        losses.append(scores(table, held_out, y[~inside])["test_loss"])
    estimator = fit(table, split, strength)
    model = estimator[-1]
    penalty = model.alpha / len(y) if table.classes is None else 1 / (model.C * len(y))
    return {
        "penalty": float(penalty),
        "cv_loss": float(np.mean(losses)),
        **scores(table, _predict(table, estimator, table.X[split.test]), table.y[split.test]),
    }


def search(table: Table, split: TuneSplit, strengths: np.ndarray | None = None) -> float:
    """The strength that scikit-learn's cross-validation chooses from a grid.

    None is the default grid of `RidgeCV` or `LogisticRegressionCV`. `LogisticRegressionCV` gets one
    scaled fold at a time, because its pipeline would fit the scaler on held-out rows too.
    """
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.model_selection import GridSearchCV
    from sklearn.preprocessing import StandardScaler

    X, y = table.X[split.train], table.y[split.train]
    parts = [
        (np.flatnonzero(split.fold != k), np.flatnonzero(split.fold == k))
        for k in range(split.num_folds)
    ]
    if table.classes is None:
        alphas = RidgeCV().alphas if strengths is None else strengths
        found = GridSearchCV(
            _estimator("ridge", None),
            {"ridge__alpha": list(alphas)},
            scoring="neg_mean_squared_error",
            cv=parts,
            refit=False,
        ).fit(X, y)
        return float(found.best_params_["ridge__alpha"])
    total = 0.0
    grid = np.logspace(-4, 4, 10) if strengths is None else strengths
    for inside, outside in parts:
        scaled = StandardScaler().fit(X[inside]).transform(X)
        found = LogisticRegressionCV(
            Cs=grid,
            cv=[(inside, outside)],
            scoring="neg_log_loss",
            refit=False,
            max_iter=2000,
        ).fit(scaled, y)
        found = found.scores_
        # A dictionary by class up to scikit-learn 1.9, with the same scores for every class.
        found = next(iter(found.values())) if isinstance(found, dict) else found
        total = total + np.reshape(found, -1)
    return float(grid[int(np.argmax(total))])


def sklearn_baselines(table: Table, split: TuneSplit) -> dict[str, dict[str, Any]]:
    """`untuned`: the default strength. `sklearn`: the strength its own search chooses."""
    with warnings.catch_warnings():
        # A baseline that has not fully converged at the weakest penalties is still what one gets.
        warnings.simplefilter("ignore")
        return {
            "untuned": _report(table, split, None),
            "sklearn": _report(table, split, search(table, split)),
        }
