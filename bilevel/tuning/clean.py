"""`bilevel clean`: one weight per training example, learned on a few trusted ones."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.tuning import engines, output
from bilevel.tuning.baselines import scores
from bilevel.tuning.clean_models import (
    TrustedRows,
    WeightedRows,
    init_weights,
    trusted_outer,
    weighted_inner,
)
from bilevel.tuning.data import Table
from bilevel.tuning.splits import CleanSplit, flip_labels
from bilevel.tuning.tune import Outcome, log_probabilities

LEARNING_PENALTY = 0.2
"""Penalty of the model through which the weights are learned, for features of mean variance 1.

Strong, so that the model cannot memorise wrong labels. It matters little: on digits .1 to 1 give the
same accuracy within half a point. As a second outer variable it goes to zero, since a thousand weights
and a weak penalty fit the trusted examples perfectly.
"""

PENALTIES = np.geomspace(1e-3, 1.0, 10)
"""Penalties tried for the refit, and for each baseline."""

NUM_STEPS = 10
"""Outer steps. More of them fit the trusted examples ever better and the test set worse."""

LEARNING_RATE = 0.06
"""Each step moves the logits of the weights by this much, in the root mean square, before momentum.

The gradient is rescaled as a whole: Adam would move an example without influence as far as one with.
"""

MAX_FOLDS = 4
"""Folds of the trusted examples on which the penalty of the refit is chosen."""

KEEP = 0.5
"""An example is kept when its weight ends above this; all weights start here."""


class Part(NamedTuple):
    """Weights of all rows (training, then trusted) for a fit, and the trusted rows that judge it."""

    weights: np.ndarray
    held_out: np.ndarray


class Choice(NamedTuple):
    """A penalty, its loss on held-out trusted examples, and the rescaling that this loss is after."""

    penalty: float
    held_out_loss: float
    temperature: float


class Fit(NamedTuple):
    """A chosen penalty and the weights of the model fitted with it."""

    choice: Choice
    w: dict[str, np.ndarray]


class Cleaned(NamedTuple):
    """Weights of the training examples, the refit with them, and how the run ended."""

    weights: np.ndarray
    fit: Fit
    status: bl.Status


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

    def trusted_predictor(self, w: Any) -> np.ndarray:
        """Linear predictor of the trusted rows."""
        return self.X[self.num_train :] @ np.asarray(w["coef"]) + np.asarray(w["intercept"])


def range_scale(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each column, and its range times one number that makes the mean variance 1.

    A standard deviation would blow up columns that are almost always the same (the border pixels
    of an image), and these are where a fit to wrong labels goes.
    """
    span = np.ptp(X, axis=0)
    span = np.where(span > 0, span, 1.0)
    return X.mean(axis=0), span * np.sqrt(np.mean(np.var(X / span, axis=0)))


def calibrate(f: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The loss of held-out predictors after the best rescaling of them, and that factor.

    Penalties differ in how timid their predictions are, which one factor mends (temperature
    scaling); what is left compares what they know.
    """
    factors = np.geomspace(0.1, 30, 60)
    losses = [scores_of(factor * f, y) for factor in factors]
    best = int(np.argmin(losses))
    return losses[best], float(factors[best])


def scores_of(f: np.ndarray, y: np.ndarray) -> float:
    """Mean cross-entropy of a linear predictor."""
    return -float(np.mean(log_probabilities(f, "softmax")[np.arange(len(y)), y]))


def learn(rows: Rows, used: np.ndarray, engine: str) -> Any:
    """Weights of the training examples from the trusted rows in use; a result of `bilevel.run`."""
    rescale = optax.normalize_by_update_norm(math.sqrt(rows.num_train))
    return bl.run(
        rows.problem(used),
        jnp.full(rows.num_train, KEEP),
        rows.start,
        num_steps=NUM_STEPS,
        solver=engines.inner_solver(engine),
        engine=engine,
        outer=optax.chain(rescale, optax.sgd(LEARNING_RATE, momentum=0.9)),
        transform=bl.transforms.Sigmoid(),
    )


def choose(rows: Rows, parts: list[Part], y: np.ndarray | None = None) -> Choice:
    """The penalty with the least loss on held-out trusted rows, from the strongest to the weakest."""
    trials = []
    starts = [rows.start] * len(parts)
    for penalty in PENALTIES[::-1]:
        f = np.empty((rows.num_trusted, rows.start["intercept"].shape[0]))
        for i, (weights, held_out) in enumerate(parts):
            starts[i] = rows.fit(weights, penalty, starts[i], y=y)
            f[held_out] = rows.trusted_predictor(starts[i])[held_out]
        loss, temperature = calibrate(f, rows.trusted_y)
        trials.append(Choice(float(penalty), loss, temperature))
    return min(trials, key=lambda choice: choice.held_out_loss)


def optimise(rows: Rows, engine: str, say: Callable[[str], None]) -> Cleaned:
    """Learn the weights on all trusted rows; choose a penalty; refit with weights and trusted rows.

    For the choice, the weights are learned anew on each part of the trusted rows: those learned on
    all of them have seen the rows that judge.
    """
    parts = []
    for fold in range(rows.num_folds):
        held_out = rows.fold == fold
        weights = learn(rows, ~held_out, engine).lam
        parts.append(Part(np.concatenate([weights, ~held_out]), held_out))
        say(f"weights learned without fold {fold + 1} of {rows.num_folds} of the trusted examples")
    choice = choose(rows, parts)
    say(f"penalty {choice.penalty:.3g}: loss {choice.held_out_loss:.4f} on held-out trusted examples")
    everything = np.ones(rows.num_trusted, bool)
    found = learn(rows, everything, engine)
    weights = np.asarray(found.lam)
    w = rows.fit(np.concatenate([weights, everything]), choice.penalty, found.w)
    return Cleaned(weights, Fit(choice, w), bl.Status(int(found.status)))


def baselines(rows: Rows, truth: np.ndarray | None) -> dict[str, Fit]:
    """Fits without learned weights, their penalties chosen on the trusted examples in the same way.

    `noisy`: the training rows as they are; `trusted`: the trusted rows alone; `pooled`: both;
    `oracle`, where the truth is known: the training rows with true labels.
    """
    train, trusted = np.ones(rows.num_train), np.ones(rows.num_trusted)
    folds = [rows.fold == fold for fold in range(rows.num_folds)]
    noisy = [Part(np.concatenate([train, 0 * trusted]), trusted > 0)]
    plans = {
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


def clean(
    table: Table,
    split: CleanSplit,
    *,
    flip: float,
    seed: int,
    engine: str,
    say: Callable[[str], None],
) -> Outcome:
    """The whole command after its input is checked."""
    assert table.classes is not None
    truth = table.y[split.train]
    labels, wrong = flip_labels(truth, len(table.classes), flip, seed)
    rows = Rows(table, split, labels, seed)
    known = f", {wrong.sum()} labels made wrong" if flip > 0 else ""
    say(
        f"{table.name}: {rows.num_train} training rows{known}, {rows.num_trusted} trusted, "
        f"{len(split.test)} for the test"
    )
    seconds = {}
    started = time.perf_counter()
    cleaned = optimise(rows, engine, say)
    seconds["cold"] = time.perf_counter() - started
    started = time.perf_counter()
    optimise(rows, engine, lambda _: None)
    seconds["warm"] = time.perf_counter() - started
    say(f"{seconds['cold']:.2f} s with compilation, {seconds['warm']:.2f} s again without")
    say("baselines with their penalties chosen on the trusted examples")
    fits = baselines(rows, truth if flip > 0 else None)
    kept = cleaned.weights > KEEP
    model = raw_model(rows, cleaned.fit)
    result = {
        "task": "softmax",
        "rows": {"train": rows.num_train, "trusted": rows.num_trusted, "test": len(split.test)},
        "flip": flip,
        "seconds": seconds,
        "status": cleaned.status.name,
        "outer_steps": NUM_STEPS,
        "hyperparameters": {
            "penalty": cleaned.fit.choice.penalty,
            "temperature": cleaned.fit.choice.temperature,
            "weights": _summary(cleaned.weights, kept),
        },
        "cv_loss": cleaned.fit.choice.held_out_loss,
        **_test_scores(table, split, model),
        "f1_kept": f1(kept, ~wrong) if flip > 0 else None,
        "f1_thrown": f1(~kept, wrong) if flip > 0 else None,
        "baselines": {
            name: {
                "penalty": fit.choice.penalty,
                "cv_loss": fit.choice.held_out_loss,
                **_test_scores(table, split, raw_model(rows, fit)),
            }
            for name, fit in fits.items()
        },
    }
    arrays = {
        **model,
        "classes": table.classes,
        "features": np.asarray(table.features),
        "penalty": np.asarray(cleaned.fit.choice.penalty),
        "weights": cleaned.weights,
        "kept": kept,
        "labels": labels,
        "flipped": wrong,
        "train_rows": split.train,
        "trusted_rows": split.trusted,
        "test_rows": split.test,
    }
    return Outcome(result, arrays, _text(table, engine, result), table.target)


def raw_model(rows: Rows, fit: Fit) -> dict[str, np.ndarray]:
    """Calibrated coefficients for features in their own units, `X @ coef + intercept`."""
    coef = fit.choice.temperature * np.asarray(fit.w["coef"]) / rows.scale[:, None]
    intercept = fit.choice.temperature * np.asarray(fit.w["intercept"]) - rows.mean @ coef
    return {"coef": coef, "intercept": intercept}


def _test_scores(
    table: Table, split: CleanSplit, model: dict[str, np.ndarray]
) -> dict[str, float | None]:
    f = table.X[split.test] @ model["coef"] + model["intercept"]
    return scores(table, log_probabilities(f, "softmax"), table.y[split.test])


def f1(found: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall of a selection."""
    total = int(found.sum()) + int(true.sum())
    return 2 * int((found & true).sum()) / total if total else 1.0


def _summary(weights: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(weights),
        "kept": int(kept.sum()),
        "min": float(weights.min()),
        "mean": float(weights.mean()),
        "max": float(weights.max()),
    }


def _text(table: Table, engine: str, result: dict[str, Any]) -> str:
    names = {
        "noisy": "all training labels as they are",
        "trusted": "the trusted examples alone",
        "pooled": "both together",
        "oracle": "all training labels put right",
    }
    entries: Iterable[tuple[str, dict[str, Any]]] = [
        ("cleaned", {**result, **result["hyperparameters"]}),
        *((names[name], found) for name, found in result["baselines"].items()),
    ]
    lines = [
        [
            name,
            output.number(found["penalty"], 3),
            output.number(found["cv_loss"]),
            output.number(found["test_loss"]),
            output.number(found["test_accuracy"]),
        ]
        for name, found in entries
    ]
    header = [f"{table.name}, {engine}", "penalty", "trusted loss", "test loss", "test accuracy"]
    weights = result["hyperparameters"]["weights"]
    ending = ""
    if result["f1_kept"] is not None:
        ending = f" (F1 of the kept {result['f1_kept']:.3f}, of the thrown {result['f1_thrown']:.3f})"
    return (
        f"\n{output.table(header, lines)}\n\n"
        f"kept {weights['kept']} of {weights['count']} training examples{ending}; status "
        f"{result['status']}; {result['seconds']['cold']:.2f} s with compilation, "
        f"{result['seconds']['warm']:.2f} s without."
    )
