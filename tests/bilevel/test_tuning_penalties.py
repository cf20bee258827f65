"""Many penalties: the statistics, what may not reach them, and the gradient of the whole objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.tuning import penalties, search
from bilevel.tuning.data import Table
from bilevel.tuning.folds import Folds
from bilevel.tuning.models import MODELS, prior
from bilevel.tuning.splits import tune_split

TASKS = ["ridge", "logistic", "softmax"]


def make_table(task: str, d: int = 6) -> Table:
    """Correlated features of different use; the last is constant."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, d)) @ (np.eye(d) + 0.3 * rng.normal(size=(d, d)))
    X[:, -1] = 3.0
    score = X[:, 0] - 0.5 * X[:, 1] + rng.normal(size=80)
    names = tuple(f"x{j}" for j in range(d))
    if task == "ridge":
        return Table("t", X, 20 + 5 * score, None, names, "y")
    classes = 2 if task == "logistic" else 3
    edges = np.quantile(score, np.arange(1, classes) / classes)
    return Table("t", X, np.digitize(score, edges), np.arange(classes), names, "y")


def make_folds(table: Table) -> Folds:
    return Folds(table, tune_split(table, 4, 0.2, 0), table.task)


def relative(folds: Folds) -> np.ndarray:
    return np.stack([folds.statistics(k, 0.05) for k in range(folds.num_folds)])


@pytest.mark.parametrize("task", TASKS)
def test_score_statistic_is_the_score_test_at_the_intercept(task):
    table = make_table(task)
    n = len(table.y)
    outputs = len(table.classes) if task == "softmax" else 1
    y = np.eye(outputs)[table.y] if task == "softmax" else table.y[:, None]
    X = table.X - table.X.mean(axis=0)
    share = y.mean(axis=0)
    intercept = {
        "ridge": lambda mean: mean,
        "logistic": lambda mean: np.log(mean / (1 - mean)),
        "softmax": np.log,
    }[task](share)

    def row_loss(coef, x, target):
        f = (x @ coef + intercept)[None, :, None]
        return MODELS[task].rows(f, target[None, None])[0, 0]

    # Gradients of each row's loss at zero coefficients, (n, d, C).
    zero = jnp.zeros((X.shape[1], outputs))
    target = table.y if task == "softmax" else table.y.astype(float)
    grads = jax.vmap(jax.grad(row_loss), (None, 0, 0))(zero, X, target)
    variance = np.outer(np.square(X[:, :-1]).mean(axis=0), y.var(axis=0))
    expected = n * np.square(np.mean(grads, axis=0))[:-1] / variance
    found = penalties.score_statistic(table.X, y)
    np.testing.assert_allclose(found[:-1], expected.mean(axis=1), rtol=1e-10)
    assert found[-1] == 0


def test_score_statistic_has_mean_one_for_noise():
    rng = np.random.default_rng(1)
    found = penalties.score_statistic(rng.normal(size=(400, 2000)), rng.normal(size=(400, 1)))
    assert abs(found.mean() - 1) < 0.1


def test_relative_penalties_are_centred_and_fall_with_evidence():
    found = penalties.relative_penalties(np.array([0.0, 3.0, 8.0]), np.array([1.0, 0.0, 5.0]))
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(found[0, 0] - found[0, 1], np.log(4.0))
    np.testing.assert_allclose(found[1, 1] - found[1, 2], np.log(2.51 / 0.01))
    # No evidence at all: every feature alike.
    np.testing.assert_array_equal(penalties.relative_penalties(np.zeros(3), np.zeros(3)), 0)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_targets_do_not_reach_the_penalties_of_their_fold(task):
    table = make_table(task)
    folds = make_folds(table)
    held_out = folds.split.train[folds.split.fold == 1]
    y = table.y.copy()
    y[held_out] = y[held_out][::-1] if task != "ridge" else 7 * y[held_out] ** 2
    other = Folds(
        Table("t", table.X, y, table.classes, table.features, "y"), folds.split, table.task
    )
    for k in range(4):
        same = np.array_equal(folds.statistics(k, 0.05), other.statistics(k, 0.05))
        assert same == (k == 1)


def evaluate(folds: Folds, rule, theta):
    solver = bl.Newton(max_steps=60, tol=1e-11, linear_solver=bl.CG())
    engine = bl.Implicit(estimate=False)
    h = bl.hypergradient(
        folds.problem(rule), jnp.asarray(theta), folds.start(), solver=solver, engine=engine
    )
    return float(h.info.outer_value), np.asarray(h.grad)


@pytest.mark.parametrize("task", TASKS)
def test_zero_exponents_are_the_single_penalty(task):
    folds = make_folds(make_table(task))
    rule = penalties.make_rule("per-feature", relative(folds), None, 0.0, folds.num_rows)
    value, _ = evaluate(folds, rule, [np.log(0.05), 0.0, 0.0])
    (single,), _ = folds.curve(np.array([0.05]))
    assert value * folds.y_scale**2 == pytest.approx(single, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "kind"), [(task, "per-feature") for task in TASKS] + [("ridge", "per-group")]
)
def test_gradient_of_the_objective_matches_differences(task, kind):
    folds = make_folds(make_table(task))
    group = np.array([0, 1, 1, 0, 2, 2])
    n = folds.num_rows
    rule = penalties.make_rule(kind, relative(folds), group, 1 / n, n)
    # So weak a level that the hinge of the prior acts.
    theta = np.array([-5.0, 0.4, 0.3] if kind == "per-feature" else [-4.0, -6.0, -5.0])
    assert float(rule.level @ theta) < -np.log(n)
    _, found = evaluate(folds, rule, theta)
    step = 1e-4
    differences = [
        (evaluate(folds, rule, theta + step * e)[0] - evaluate(folds, rule, theta - step * e)[0])
        / (2 * step)
        for e in np.eye(3)
    ]
    np.testing.assert_allclose(found, differences, rtol=1e-5)


def test_prior_is_the_stated_one():
    relative = np.random.default_rng(0).normal(size=(2, 2, 5))
    rule = penalties.make_rule("per-feature", relative, None, 0.5, 100)
    hinge = (-6 + np.log(100)) ** 2 / 18
    expected = 0.5 * (2 * (0.3**2 + 0.7**2) + hinge)
    assert float(prior(jnp.array([-6.0, 0.3, 0.7]), rule)) == pytest.approx(expected)
    assert float(prior(jnp.array([-1.0, 0.0, 0.0]), rule)) == 0
    rule = penalties.make_rule("per-group", relative, np.array([0, 0, 1, 2, 2]), 0.5, 100)
    theta = np.array([1.0, 2.0, 6.0])
    expected = 0.5 * np.square(theta - 3).sum() / 8
    assert float(prior(jnp.asarray(theta), rule)) == pytest.approx(expected)


def test_permuting_features_permutes_the_penalties():
    table = make_table("ridge")
    order = np.array([3, 0, 5, 1, 4, 2])
    names = tuple(table.features[j] for j in order)
    permuted = Table("t", table.X[:, order], table.y, table.classes, names, "y")
    found = [
        search.optimise(make_folds(t), "per-feature", "implicit", lambda _: None)
        for t in (table, permuted)
    ]
    assert np.ptp(np.log(found[0].penalties)) > 0.1
    np.testing.assert_allclose(found[0].penalties[order], found[1].penalties, rtol=1e-2)


def test_the_prior_of_a_regression_is_in_units_of_its_noise(monkeypatch):
    folds = make_folds(make_table("ridge"))
    weights = []
    make_rule = penalties.make_rule

    def spy(kind, relative, group, weight, num_rows):
        weights.append(weight)
        return make_rule(kind, relative, group, weight, num_rows)

    monkeypatch.setattr(penalties, "make_rule", spy)
    search.optimise(folds, "per-feature", "implicit", lambda _: None)
    first, *_, last = weights
    # Twice the half squared error that one penalty reaches, over the variance of the target.
    cv = folds.curve(np.geomspace(1e-4, 1e2, 40))[0].min() / folds.y_scale**2
    assert first == 1 / folds.num_rows
    assert last == pytest.approx(2 * cv / folds.num_rows, rel=2e-2)
