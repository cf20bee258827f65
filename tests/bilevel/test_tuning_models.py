"""The stacked folds against scikit-learn pipelines; what may not reach a fit does not."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.tuning.data import Table, load_table
from bilevel.tuning.folds import Folds, raw_model
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import tune_split


def small_table(task: str) -> Table:
    """A table with a constant column, one constant in most rows, and scales far apart."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 5)) * [1.0, 1e3, 1e-3, 0.0, 0.0] + [0.0, 5e3, 0.0, 7.0, 0.0]
    X[::20, 4] = 1.0
    score = X[:, 0] + X[:, 1] / 1e3 - 5 + 0.3 * rng.normal(size=60)
    names = tuple("abcde")
    if task == "ridge":
        return Table("small", X, 50 + 10 * score, None, names, "y")
    classes = 2 if task == "logistic" else 3
    edges = np.quantile(score, np.arange(1, classes) / classes)
    return Table("small", X, np.digitize(score, edges), np.arange(classes), names, "y")


@pytest.mark.parametrize("task", ["ridge", "logistic", "softmax"])
@pytest.mark.parametrize("penalty", [0.3, 0.01])
def test_folds_and_refit_match_scikit_learn(task, penalty):
    table = small_table(task)
    split = tune_split(table, 3, 0.2, 0)
    assert table.task == task
    folds = Folds(table, split, task)
    (value,), _ = folds.curve(np.array([penalty]))
    X, y = table.X[split.train], table.y[split.train]

    def reference(rows):
        strength = penalty * rows.sum()
        model = (
            Ridge(strength)
            if task == "ridge"
            else LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000)
        )
        return make_pipeline(StandardScaler(), model).fit(X[rows], y[rows])

    def predict(model, X):
        return model.predict(X) if task == "ridge" else model.predict_log_proba(X)

    losses = []
    for fold in range(3):
        model = reference(split.fold != fold)
        inside = split.fold == fold
        losses.append(scores(table, predict(model, X[inside]), y[inside])["test_loss"])
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)

    model = raw_model(folds, folds.fit_part(-1, penalty))
    found = log_probabilities(table.X @ model["coef"] + model["intercept"], task)
    expected = predict(reference(np.ones(len(y), bool)), table.X)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_held_out_rows_do_not_reach_their_own_fold():
    table = load_table("diabetes", None)
    split = tune_split(table, 5, 0.25, 0)
    changed = table.X.copy()
    held_out = split.train[split.fold == 2]
    changed[held_out] = 100 * changed[held_out][::-1] + 3
    other = Table(table.name, changed, table.y, None, table.features, table.target)
    fits = [Folds(t, split, "ridge").fit_part(2, 0.1)["coef"] for t in (table, other)]
    # The common scaling of all training rows drops out.
    np.testing.assert_allclose(fits[0], fits[1], rtol=0, atol=1e-4)


def test_test_rows_do_not_reach_the_fit():
    table = load_table("wine", None)
    split = tune_split(table, 5, 0.25, 0)
    changed = table.X.copy()
    changed[split.test] = 0.0
    folds = [
        Folds(Table("t", X, table.y, table.classes, table.features, "y"), split, "softmax")
        for X in (table.X, changed)
    ]
    values = [f.curve(np.array([0.1]))[0][0] for f in folds]
    assert values[0] == values[1]
