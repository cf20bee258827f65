"""`bilevel tune`: one penalty of a linear model, by cross-validation and hypergradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.tuning import engines, output
from bilevel.tuning.baselines import sklearn_baselines
from bilevel.tuning.data import Table
from bilevel.tuning.models import MODELS, FoldBatch, init_weights
from bilevel.tuning.output import Outcome
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import TuneSplit
from bilevel.tuning.steps import run_steps, step_fields, timed, took

BOUNDS = (1e-6, 1e4)
"""Range of the penalties that are looked at, for features of unit variance."""

NUM_COARSE = 11
"""The cross-validation curve can have several minima and flat ends: start from the best decade."""

NUM_STEPS = 10
"""Outer steps from there. Their rate decays: they reach 1.7 in log-penalty (a decade is 2.3) and settle."""

NUM_FINE = 60
"""Points of the grid that the result is compared with."""


class Tuned(NamedTuple):
    """One optimisation: penalty, cross-validated loss there (inner problem solved anew), refit."""

    penalty: float
    cv_loss: float
    refit: dict[str, np.ndarray]
    steps: bl.Result


class Folds:
    """The bilevel problem of a table: inner = training parts, outer = held-out parts.

    Features are put on the scale of all training rows first, for conditioning only: the
    standardisation inside each fold comes after it and undoes it. So does the scale of a
    regression target: a ridge fit is linear in it.
    """

    def __init__(self, table: Table, split: TuneSplit) -> None:
        self.table = table
        self.model = MODELS[table.task]
        self.num_folds = split.num_folds
        self.num_outputs = len(table.classes) if table.task == "softmax" else 1  # type: ignore[arg-type]
        X, y = table.X[split.train], table.y[split.train]
        inside = np.stack([split.fold != k for k in range(split.num_folds)])
        self.mean, self.scale = mean_and_scale(X)
        self.y_mean, self.y_scale = (0.0, 1.0) if table.classes is not None else (y.mean(), y.std())
        if table.classes is None:
            y = (y - self.y_mean) / self.y_scale
        elif table.task == "logistic":
            y = y.astype(np.float64)
        moments = [mean_and_scale(X[rows]) for rows in inside]
        shift = (np.stack([m for m, _ in moments]) - self.mean) / self.scale
        ratio = self.scale / np.stack([s for _, s in moments])
        self._rows = (jnp.asarray((X - self.mean) / self.scale), jnp.asarray(y))
        self.inner_data = self._batch(inside, shift, ratio)
        self.problem = bl.Problem(
            self.model.inner, self.model.outer, self.inner_data, self._batch(~inside, shift, ratio)
        )
        everything = self._batch(np.ones_like(inside), 0 * shift, np.ones_like(ratio))
        # K times the same fit on all rows: the shapes of the folds, so nothing compiles anew.
        self.everything = bl.Problem(
            self.model.inner, self.model.outer, everything, self.problem.outer_data
        )

    def _batch(self, rows: np.ndarray, shift: np.ndarray, ratio: np.ndarray) -> FoldBatch:
        weight = rows / rows.sum(axis=1, keepdims=True)
        return FoldBatch(*self._rows, *(jnp.asarray(a) for a in (weight, shift, ratio)))

    def start(self) -> Any:
        """Zero weights."""
        return init_weights(self.num_folds, self.table.X.shape[1], self.num_outputs)

    def solve(self, penalty: float, w: Any, problem: bl.Problem | None = None) -> tuple[float, Any]:
        """Held-out loss in the units of the target, and the weights, of a converged inner solve."""
        value, w = engines.solve(self.problem if problem is None else problem, penalty, w)
        return float(value) * self.y_scale**2, w

    def curve(self, penalties: np.ndarray) -> tuple[np.ndarray, Any]:
        """Held-out losses over penalties, and the weights at the best.

        Solved from the strongest penalty to the weakest, each from the solution before.
        """
        values = np.empty(len(penalties))
        w = best = self.start()
        for i in np.argsort(-penalties):
            values[i], w = self.solve(float(penalties[i]), w)
            if values[i] <= np.min(values[penalties >= penalties[i]]):
                best = w
        return values, best


def mean_and_scale(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; 1 for a column that is constant up to rounding."""
    mean, scale = X.mean(axis=0), X.std(axis=0)
    rounding = 10 * np.finfo(np.float64).eps * np.abs(X).max(axis=0)
    return mean, np.where(scale <= rounding, 1.0, scale)


def optimise(
    folds: Folds, engine: str, say: Callable[[str], None], *, progress: bool = False
) -> Tuned:
    """Best decade, hypergradient steps on the log-penalty, converged solve, refit on all rows."""
    coarse = np.geomspace(*BOUNDS, NUM_COARSE)
    values, w = folds.curve(coarse)
    start = coarse[int(np.argmin(values))]
    say(f"best decade: penalty {start:.0e}, cross-validated loss {values.min():.5g}")
    result = run_steps(
        folds.problem,
        jnp.asarray(start),
        w,
        engine=engine,
        num_steps=NUM_STEPS,
        say=say,
        progress=progress,
        # One variable: Adam's step is its rate times a sign, and a long memory would overshoot.
        outer=optax.adam(optax.exponential_decay(0.5, 1, 0.75), b1=0.5, b2=0.9),
        transform=bl.transforms.Exp(),
    )
    penalty = float(np.clip(result.best.lam, *BOUNDS))
    cv_loss, w = folds.solve(penalty, result.best.w)
    if cv_loss > values.min():  # an engine's own weights can flatter its outer value
        say("the hypergradient steps did not improve on the best decade")
        penalty = float(start)
        cv_loss, w = folds.solve(penalty, w)
    say(
        f"{len(result.history.status)} hypergradient steps: penalty {penalty:.4g}, "
        f"cross-validated loss {cv_loss:.5g}"
    )
    refit = folds.solve(penalty, w, folds.everything)[1]
    return Tuned(
        penalty,
        cv_loss,
        {name: np.asarray(leaf)[0] for name, leaf in refit.items()},
        result,
    )


def tune(table: Table, split: TuneSplit, *, engine: str, say: Callable[[str], None]) -> Outcome:
    """The whole command after its input is checked."""
    say(
        f"{table.name}: {table.task} regression on {table.X.shape[1]} features, {len(split.train)} "
        f"training rows in {split.num_folds} folds, {len(split.test)} test rows"
    )
    folds = Folds(table, split)
    tuned, seconds = timed(functools.partial(optimise, folds, engine), say)
    say("baselines on the same splits and folds")
    baselines = sklearn_baselines(table, split)
    baselines["single"] = _single(folds, split)
    model = raw_model(folds, tuned.refit)
    tested = _test_scores(table, split, model)
    result = {
        "task": table.task,
        "rows": {"train": len(split.train), "test": len(split.test)},
        "folds": split.num_folds,
        "seconds": seconds,
        **step_fields(tuned.steps),
        "hyperparameters": {"penalty": tuned.penalty},
        "cv_loss": tuned.cv_loss,
        **tested,
        "baselines": baselines,
    }
    arrays = {
        **model,
        "penalty": np.asarray(tuned.penalty),
        "features": np.asarray(table.features),
        "train_rows": split.train,
        "test_rows": split.test,
        "fold": split.fold,
    }
    if table.classes is not None:
        arrays["classes"] = table.classes
    return Outcome(result, arrays, _text(table, engine, result), table.target)


def _single(folds: Folds, split: TuneSplit) -> dict[str, Any]:
    """One penalty by the fine grid on the same folds."""
    grid = np.geomspace(*BOUNDS, NUM_FINE)
    values, w = folds.curve(grid)
    best = int(np.argmin(values))
    refit = folds.solve(float(grid[best]), w, folds.everything)[1]
    model = raw_model(folds, {name: np.asarray(leaf)[0] for name, leaf in refit.items()})
    return {
        "penalty": float(grid[best]),
        "cv_loss": float(values[best]),
        "grid_points": NUM_FINE,
        **_test_scores(folds.table, split, model),
    }


def raw_model(folds: Folds, refit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Coefficients for features and target in their own units, `X @ coef + intercept`."""
    coef = refit["coef"] / folds.scale[:, None] * folds.y_scale
    intercept = refit["intercept"] * folds.y_scale + folds.y_mean - folds.mean @ coef
    return {"coef": coef, "intercept": intercept}


def _test_scores(
    table: Table, split: TuneSplit, model: dict[str, np.ndarray]
) -> dict[str, float | None]:
    f = table.X[split.test] @ model["coef"] + model["intercept"]
    return scores(table, log_probabilities(f, table.task), table.y[split.test])


def _text(table: Table, engine: str, result: dict[str, Any]) -> str:
    score = "test R2" if table.classes is None else "test accuracy"
    key = score.replace(" ", "_").lower()
    rows = [("tuned by hypergradients", {**result, **result["hyperparameters"]})]
    single = result["baselines"]["single"]
    names = {
        "untuned": "scikit-learn, default strength",
        "sklearn": "scikit-learn, its own grid and CV",
        "single": f"grid of {single['grid_points']} penalties",
    }
    rows += [(names[name], found) for name, found in result["baselines"].items()]
    lines = [
        [
            name,
            output.short(found["penalty"]),
            output.fixed(found["cv_loss"]),
            output.fixed(found["test_loss"]),
            output.fixed(found[key]),
        ]
        for name, found in rows
    ]
    gap = 100 * (result["cv_loss"] / single["cv_loss"] - 1)
    header = [f"{table.name}, {engine}", "penalty", "CV loss", "test loss", score]
    return (
        f"\n{output.table(header, lines)}\n\n"
        f"CV loss {gap:+.2f} % from the best of the grid; {result['outer_steps']} hypergradient "
        f"steps, status {result['status']}; {took(result['seconds'])}."
    )
