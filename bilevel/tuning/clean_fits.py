"""Fits whose penalty is chosen on held-out trusted examples: the refit and the baselines."""

from typing import NamedTuple

import numpy as np

from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.scores import cross_entropy

PENALTIES = np.geomspace(1e-3, 1.0, 10)
"""Penalties tried for the refit, and for each baseline."""


class Part(NamedTuple):
    """Weights of all rows (training, then trusted) for a fit, and the trusted rows that judge it."""

    weights: np.ndarray
    held_out: np.ndarray


class Choice(NamedTuple):
    """A penalty, what `calibrate` says of it on held-out trusted examples."""

    penalty: float
    criterion: float
    held_out_loss: float
    temperature: float


class Fit(NamedTuple):
    """A chosen penalty and the weights of the model fitted with it."""

    choice: Choice
    w: dict[str, np.ndarray]


def calibrate(f: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """What held-out predictors are worth after the best rescaling of them: (criterion, loss, factor).

    Penalties differ in how timid their predictions are, which one factor mends (temperature
    scaling); what is left compares what they know. The criterion smooths the labels by 1 / (n + 2), as
    Platt scaling does: where all held-out rows are right, the factor would grow without bound.
    """
    smoothing = 1 / (len(y) + 2)
    factors = np.geomspace(0.1, 30, 60)
    criteria = [cross_entropy(factor * f, y, smoothing) for factor in factors]
    best = int(np.argmin(criteria))
    return criteria[best], cross_entropy(factors[best] * f, y), float(factors[best])


def choose(rows: Rows, parts: list[Part], y: np.ndarray | None = None) -> Choice:
    """The penalty with the least loss on held-out trusted rows, from the strongest to the weakest."""
    trials = []
    starts = [rows.start] * len(parts)
    for penalty in PENALTIES[::-1]:
        f = np.empty((rows.num_trusted, rows.start["intercept"].shape[0]))
        for i, (weights, held_out) in enumerate(parts):
            starts[i] = rows.fit(weights, penalty, starts[i], y=y)
            f[held_out] = rows.trusted_predictor(starts[i])[held_out]
        trials.append(Choice(float(penalty), *calibrate(f, rows.trusted_y)))
    return min(trials, key=lambda choice: choice.criterion)


def baselines(rows: Rows, truth: np.ndarray | None) -> dict[str, Fit]:
    """Fits without learned weights, their penalties chosen on the trusted examples in the same way.

    `noisy`: the training rows as they are; `trusted`: the trusted rows alone; `pooled`: both;
    `oracle`, where the truth is known: the training rows with true labels.
    """
    train, trusted = np.ones(rows.num_train), np.ones(rows.num_trusted)
    folds = [rows.fold == fold for fold in range(rows.num_folds)]
    noisy = [Part(np.concatenate([train, 0 * trusted]), trusted > 0)]
    plans: dict[str, tuple[list[Part], np.ndarray | None]] = {
        "noisy": (noisy, None),
        "trusted": ([Part(np.concatenate([0 * train, ~out]), out) for out in folds], None),
        "pooled": ([Part(np.concatenate([train, ~out]), out) for out in folds], None),
    }
    if truth is not None:
        plans["oracle"] = (noisy, np.concatenate([truth, rows.trusted_y]))
    fits = {}
    for name, (parts, y) in plans.items():
        choice = choose(rows, parts, y)
        weights = np.concatenate(
            [0 * train if name == "trusted" else train, trusted * (name in ("trusted", "pooled"))]
        )
        fits[name] = Fit(choice, rows.fit(weights, choice.penalty, rows.start, y=y))
    return fits


def raw_model(rows: Rows, fit: Fit) -> dict[str, np.ndarray]:
    """Calibrated coefficients for features in their own units, `X @ coef + intercept`."""
    coef = fit.choice.temperature * np.asarray(fit.w["coef"]) / rows.scale[:, None]
    intercept = fit.choice.temperature * np.asarray(fit.w["intercept"]) - rows.mean @ coef
    return {"coef": coef, "intercept": intercept}
