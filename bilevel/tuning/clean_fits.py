"""Fits whose penalty is chosen on held-out trusted examples: the refit and the baselines."""

from typing import Any, NamedTuple

import numpy as np

from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.scores import cross_entropy, log_probabilities

PENALTIES = np.geomspace(1e-3, 1.0, 10)
"""Penalties tried for the refit, and for each baseline."""


class Part(NamedTuple):
    """Weights of all rows (training, then trusted) for a fit, and the trusted rows that judge it."""

    weights: np.ndarray
    held_out: np.ndarray


class Plan(NamedTuple):
    """What is fitted: the parts that choose a penalty, the weights of the refit, other labels."""

    parts: list[Part]
    weights: np.ndarray
    y: np.ndarray | None = None


class Choice(NamedTuple):
    """A penalty, and what `calibrate` says of it on held-out trusted examples."""

    penalty: float
    criterion: float
    held_out_loss: float
    temperature: float
    predictor: np.ndarray
    """Calibrated linear predictors of the trusted rows while held out, (num_trusted, num_classes)."""
    models: list[Any]
    """Weights of the model of each part."""


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


def choose(rows: Rows, plan: Plan) -> Choice:
    """The penalty with the least loss on held-out trusted rows, from the strongest to the weakest."""
    trials = []
    models = [rows.start] * len(plan.parts)
    for penalty in PENALTIES[::-1]:
        models = [
            rows.fit(part.weights, penalty, w, y=plan.y)
            for part, w in zip(plan.parts, models, strict=True)
        ]
        f = np.empty((rows.num_trusted, rows.start["intercept"].shape[0]))
        for part, w in zip(plan.parts, models, strict=True):
            f[part.held_out] = rows.predictor(w)[rows.num_train :][part.held_out]
        criterion, loss, factor = calibrate(f, rows.trusted_y)
        trials.append(Choice(float(penalty), criterion, loss, factor, factor * f, models))
    return min(trials, key=lambda choice: choice.criterion)


def fit(rows: Rows, plan: Plan) -> Fit:
    """Choose a penalty, then fit with it."""
    choice = choose(rows, plan)
    return Fit(choice, rows.fit(plan.weights, choice.penalty, rows.start, y=plan.y))


def belief(rows: Rows, choice: Choice, w: Any) -> np.ndarray:
    """Calibrated probability that a model gives to the given label of each training row."""
    log_p = log_probabilities(choice.temperature * rows.predictor(w)[: rows.num_train], "softmax")
    return np.exp(log_p[np.arange(rows.num_train), rows.y[: rows.num_train]])


def second_look(rows: Rows, plan: Plan, found: Fit) -> Plan:
    """The plan with the weight of each training row replaced by how far its fit believes the label.

    Each part believes its own model, which has not seen the trusted rows that judge the part.
    """
    n = rows.num_train
    parts = [
        Part(np.concatenate([belief(rows, found.choice, w), part.weights[n:]]), part.held_out)
        for part, w in zip(plan.parts, found.choice.models, strict=True)
    ]
    refit = np.concatenate([belief(rows, found.choice, found.w), plan.weights[n:]])
    return Plan(parts, refit)


def baselines(rows: Rows, truth: np.ndarray | None) -> dict[str, Fit]:
    """Fits without hypergradients, their penalties chosen on the trusted examples in the same way.

    `noisy`: the training rows as they are; `trusted`: the trusted rows alone; `pooled`: both;
    `self_trained`: `pooled` and a second look; `oracle`, where the truth is known: the training rows
    with true labels.
    """
    train, trusted = np.ones(rows.num_train), np.ones(rows.num_trusted)
    folds = [rows.fold == fold for fold in range(rows.num_folds)]

    def with_trusted(weights: np.ndarray) -> Plan:
        parts = [Part(np.concatenate([weights, ~out]), out) for out in folds]
        return Plan(parts, np.concatenate([weights, trusted]))

    without = np.concatenate([train, 0 * trusted])
    noisy = Plan([Part(without, trusted > 0)], without)
    pooled = with_trusted(train)
    fits = {
        name: fit(rows, plan)
        for name, plan in {
            "noisy": noisy,
            "trusted": with_trusted(0 * train),
            "pooled": pooled,
        }.items()
    }
    fits["self_trained"] = fit(rows, second_look(rows, pooled, fits["pooled"]))
    if truth is not None:
        fits["oracle"] = fit(rows, noisy._replace(y=np.concatenate([truth, rows.trusted_y])))
    return fits


def raw_model(rows: Rows, fit: Fit) -> dict[str, np.ndarray]:
    """Calibrated coefficients for features in their own units, `X @ coef + intercept`."""
    coef = fit.choice.temperature * np.asarray(fit.w["coef"]) / rows.scale[:, None]
    intercept = fit.choice.temperature * np.asarray(fit.w["intercept"]) - rows.mean @ coef
    return {"coef": coef, "intercept": intercept}
