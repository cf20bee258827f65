"""The second look against scikit-learn, and what is said of a cleaning."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support

from bilevel.tuning import clean
from bilevel.tuning.clean_findings import judge, selection_scores, suspects, suspects_csv
from bilevel.tuning.clean_fits import (
    PENALTIES,
    Choice,
    Part,
    Plan,
    baselines,
    belief,
    fit,
    second_look,
)
from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.data import load_table
from bilevel.tuning.splits import clean_split, flip_labels


@pytest.fixture(scope="module")
def noisy_wine():
    table = load_table("wine", None)
    split = clean_split(table, 30, 90, 0)
    labels, wrong = flip_labels(table.y[split.train], 3, 0.3, 0)
    rows = Rows(table, split, labels, 0)
    start = np.random.default_rng(0).uniform(0.2, 1, rows.num_train)
    outside = [rows.fold == fold for fold in range(rows.num_folds)]
    parts = [Part(np.concatenate([start, ~out]), out) for out in outside]
    plan = Plan(parts, np.concatenate([start, np.ones(rows.num_trusted)]))
    return rows, plan, fit(rows, plan), wrong


def reference(rows, weights, choice) -> np.ndarray:
    """Calibrated linear predictors of all rows by scikit-learn."""
    used = weights > 0  # a row without weight does not count
    model = LogisticRegression(C=1 / (choice.penalty * used.sum()), tol=1e-8)
    model.fit(rows.X[used], rows.y[used], sample_weight=weights[used])
    return choice.temperature * model.decision_function(rows.X)


def test_second_look_matches_scikit_learn(noisy_wine):
    rows, plan, found, wrong = noisy_wine
    assert PENALTIES.min() < found.choice.penalty < PENALTIES.max()
    looked = second_look(rows, plan, found)

    def expected(weights):
        f = reference(rows, weights, found.choice)[: rows.num_train]
        p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
        return p[np.arange(rows.num_train), rows.y[: rows.num_train]]

    for before, after in zip(plan.parts, looked.parts, strict=True):
        np.testing.assert_allclose(
            after.weights[: rows.num_train], expected(before.weights), atol=5e-3
        )
        np.testing.assert_array_equal(after.weights[rows.num_train :], ~before.held_out)
    weights = looked.weights[: rows.num_train]
    np.testing.assert_allclose(weights, expected(plan.weights), atol=5e-3)
    assert weights[~wrong].mean() > 0.8
    assert weights[wrong].mean() < 0.2


@pytest.mark.parametrize("name", ["noisy", "trusted", "pooled"])
def test_baselines_are_judged_by_models_that_have_not_seen_the_judges(noisy_wine, name):
    rows = noisy_wine[0]
    choice = baselines(rows, None)[name].choice
    train = np.full(rows.num_train, float(name != "trusted"))
    for fold in range(rows.num_folds):
        out = rows.fold == fold
        weights = np.concatenate([train, ~out * (name != "noisy")])
        expected = reference(rows, weights, choice)[rows.num_train :][out]
        found = choice.predictor[out]
        np.testing.assert_allclose(
            *(f - f.mean(1, keepdims=True) for f in (found, expected)), atol=0.02
        )


def test_learned_weights_are_judged_by_trusted_rows_they_have_not_seen(noisy_wine, monkeypatch):
    rows = noisy_wine[0]
    learned, plans = [], []
    rng = np.random.default_rng(0)

    def learn(rows, used, engine, say, **kwargs):
        learned.append((used, rng.uniform(0.1, 0.9, rows.num_train)))
        return SimpleNamespace(lam=learned[-1][1], status=0, stopped="num_steps", history=None)

    def spy(rows, plan):
        plans.append(plan)
        return fit(rows, plan)

    monkeypatch.setattr(clean, "learn", learn)
    monkeypatch.setattr(clean, "fit", spy)
    cleaned = clean.optimise(rows, "implicit", lambda _: None)
    first, second = plans
    for (used, lam), part, later in zip(learned[1:], first.parts, second.parts, strict=True):
        np.testing.assert_array_equal(used, ~part.held_out)
        np.testing.assert_array_equal(part.weights, np.concatenate([lam, used]))
        np.testing.assert_array_equal(later.held_out, part.held_out)
        np.testing.assert_array_equal(later.weights[rows.num_train :], used)
    assert np.all(sum(part.held_out.astype(int) for part in first.parts) == 1)
    assert learned[0][0].all()
    np.testing.assert_array_equal(cleaned.learned, learned[0][1])
    np.testing.assert_array_equal(cleaned.weights, second.weights[: rows.num_train])
    assert second.weights[rows.num_train :].all()


def test_held_out_rows_do_not_reach_the_weights_of_their_part(noisy_wine):
    rows, plan, found, _ = noisy_wine
    part = plan.parts[1]
    labels = rows.y.copy()
    held_out = rows.num_train + np.flatnonzero(part.held_out)
    labels[held_out] = (labels[held_out] + 1) % 3
    w = rows.fit(part.weights, found.choice.penalty, rows.start, y=labels)
    weights = belief(rows, found.choice, w)
    seen = second_look(rows, plan, found).parts[1].weights[: rows.num_train]
    np.testing.assert_allclose(weights, seen, atol=5e-3)


def test_verdict_follows_the_held_out_losses(noisy_wine):
    rows = noisy_wine[0]
    hit = np.eye(3)[rows.trusted_y]
    noise = np.random.default_rng(0).normal(size=hit.shape)

    def choice(strength):
        return Choice(1.0, 0.0, 0.0, 1.0, strength * hit + 0.1 * noise, [])

    good, fair, bad = choice(3), choice(1.01), choice(1)
    found = judge(rows, good, {"noisy": bad, "trusted": fair})
    assert found["verdict"].startswith("cleaning pays (")
    assert found["held_out"]["alternative"] == "trusted"
    log_p = [c.predictor - np.log(np.exp(c.predictor).sum(1, keepdims=True)) for c in (fair, good)]
    gain = ((log_p[1] - log_p[0]) * hit).sum(axis=1)
    assert found["held_out"]["gain"] == pytest.approx(gain.mean())
    assert found["held_out"]["standard_error"] == pytest.approx(gain.std(ddof=1) / np.sqrt(30))
    found = judge(rows, bad, {"noisy": good, "trusted": fair})
    assert found["verdict"].startswith("cleaning does not pay, take all training labels as they")
    unsure = choice(np.where(np.arange(30) % 2 == 0, 0.7, 1.5)[:, None])
    found = judge(rows, unsure, {"pooled": fair})
    assert found["verdict"].startswith("cannot tell whether cleaning pays")


def test_selection_scores_match_scikit_learn():
    rng = np.random.default_rng(1)
    found, true = rng.random((2, 50)) < 0.4
    expected = precision_recall_fscore_support(true, found, average="binary")[:3]
    np.testing.assert_allclose(list(selection_scores(found, true, "x").values()), expected)
    nothing = np.zeros(50, bool)
    assert set(selection_scores(nothing, nothing, "x").values()) == {1.0}


def test_suspects_hold_rows_of_the_table():
    table = load_table("iris", None)
    weights = np.array([0.4, 0.9, 0.5, 0.1])
    labels, predicted = np.array([0, 1, 2, 0]), np.array([1, 1, 1, 2])
    found = suspects(table, np.array([7, 11, 13, 17]), labels, predicted, weights)
    assert [one["row"] for one in found] == [17, 7, 13]
    assert suspects_csv(found) == "row,given,predicted,weight\n17,0,2,0.1\n7,0,1,0.4\n13,2,1,0.5\n"
