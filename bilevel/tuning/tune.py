"""`bilevel tune`: penalties of a linear model, by cross-validation and hypergradients."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from bilevel.tuning import output
from bilevel.tuning.baselines import sklearn_baselines
from bilevel.tuning.data import Table
from bilevel.tuning.folds import BOUNDS, Folds, raw_model
from bilevel.tuning.models import Rule
from bilevel.tuning.options import Groups
from bilevel.tuning.output import Outcome
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.search import Tuned, optimise
from bilevel.tuning.splits import TuneSplit
from bilevel.tuning.steps import step_fields, timed, took

NUM_FINE = 60
"""Points of the grid of single penalties that the result is compared with."""

WARNING = (
    "warning: one free penalty per feature fits the noise of the held-out rows: over 8 splits its test "
    "loss was 1.34 times (breast_cancer) and 3.65 times (the same with 100 columns of noise) that of one "
    "penalty, where --penalty per-feature had 0.90 and 0.52 (benchmarks/penalties.py)"
)

METHODS = {
    "single": "one penalty, hypergradients",
    "per-group": "penalty per group",
    "per-feature": "penalty per feature",
    "free": "free penalty per feature",
    "untuned": "scikit-learn, default strength",
    "sklearn": "scikit-learn, its own grid and CV",
    "grid": f"grid of {NUM_FINE} penalties",
}
"""Names of the rows of the table."""


def tune(
    table: Table,
    split: TuneSplit,
    *,
    model: str,
    penalty: str,
    groups: Groups | None,
    engine: str,
    say: Callable[[str], None],
) -> Outcome:
    """The whole command after its input is checked."""
    say(
        f"{table.name}: {model} regression on {table.X.shape[1]} features, {len(split.train)} "
        f"training rows in {split.num_folds} folds, {len(split.test)} test rows"
    )
    if penalty == "free":
        say(WARNING)
    folds = Folds(table, split, model)
    group = None if groups is None else groups.of_feature
    search = functools.partial(optimise, folds, penalty, engine, group=group)
    tuned, seconds = timed(search, say)
    say("baselines on the same splits and folds")
    baselines = sklearn_baselines(table, split)
    baselines["single"] = _single(folds, tuned.rule)
    fitted = raw_model(folds, tuned.refit)
    result = {
        "task": model,
        "rows": {"train": len(split.train), "test": len(split.test)},
        "folds": split.num_folds,
        "seconds": seconds,
        **step_fields(tuned.steps),
        "evaluations": tuned.evaluations,
        "penalty": penalty,
        "hyperparameters": _hyperparameters(table, penalty, tuned, groups),
        "cv_loss": tuned.cv_loss,
        **_test_scores(folds, fitted),
        "baselines": baselines,
    }
    result["verdict"] = _verdict(table, result)
    arrays = {
        **fitted,
        "penalties": tuned.penalties,
        "features": np.asarray(table.features),
        "train_rows": split.train,
        "test_rows": split.test,
        "fold": split.fold,
    }
    if table.classes is not None:
        arrays["classes"] = table.classes
    return Outcome(result, arrays, _text(table, engine, result), table.target)


def _hyperparameters(
    table: Table, penalty: str, tuned: Tuned, groups: Groups | None
) -> dict[str, Any]:
    """What was tuned. Penalties are those of features of unit variance; the level is their geometric mean."""
    if penalty == "single":
        return {"penalty": tuned.level}
    found: dict[str, Any] = {"level": tuned.level}
    if penalty == "per-feature":
        found["exponents"] = {"score": tuned.theta[1], "ridge": tuned.theta[2]}
    if groups is not None:
        values = np.exp(tuned.theta)
        pairs = zip(groups.names, values, strict=True)
        return found | {"penalties": [{"group": name, "penalty": value} for name, value in pairs]}
    pairs = zip(table.features, tuned.penalties, strict=True)
    return found | {"penalties": [{"feature": name, "penalty": value} for name, value in pairs]}


def _single(folds: Folds, rule: Rule) -> dict[str, Any]:
    """One penalty by the fine grid on the same folds; `rule` has the shapes of the search's."""
    grid = np.geomspace(*BOUNDS, NUM_FINE)
    values, _ = folds.curve(grid, rule)
    best = int(np.argmin(values))
    return {
        "penalty": float(grid[best]),
        "cv_loss": float(values[best]),
        "grid_points": NUM_FINE,
        **_test_scores(folds, raw_model(folds, folds.fit_part(-1, grid[best]))),
    }


def _test_scores(folds: Folds, model: dict[str, np.ndarray]) -> dict[str, float | None]:
    table, test = folds.table, folds.split.test
    f = table.X[test] @ model["coef"] + model["intercept"]
    return scores(table, log_probabilities(f, folds.task), table.y[test])


def _text(table: Table, engine: str, result: dict[str, Any]) -> str:
    score = "test R2" if table.classes is None else "test accuracy"
    key = score.replace(" ", "_").lower()
    kind, single = result["penalty"], result["baselines"]["single"]
    found = result["hyperparameters"]
    level = found["penalty"] if kind == "single" else found["level"]
    baselines = result["baselines"]
    rows = [
        (METHODS[kind], result | {"penalty": level}),
        (METHODS["untuned"], baselines["untuned"]),
        (METHODS["sklearn"], baselines["sklearn"]),
        (METHODS["grid"], single),
    ]
    lines = [
        [
            name,
            output.short(row["penalty"]),
            output.fixed(row["cv_loss"]),
            output.fixed(row["test_loss"]),
            output.fixed(row[key]),
        ]
        for name, row in rows
    ]
    column = "penalty" if kind == "single" else "mean penalty"
    header = [f"{table.name}, {engine}", column, "CV loss", "test loss", score]
    gap = _against(result["cv_loss"], single["cv_loss"], _spread(table), 2)
    evaluations = sum(result["evaluations"].values())
    return (
        f"\n{output.table(header, lines)}\n\n"
        f"Beside the best of the grid: CV loss {gap}; {evaluations} evaluations of it, "
        f"status {result['status']}; {took(result['seconds'])}.\n{result['verdict']}"
        + ("" if kind == "single" else _strongest(found["penalties"]))
    )


def _spread(table: Table) -> float:
    """A loss that is large for the target: its variance, or one nat."""
    return float(np.var(table.y)) if table.classes is None else 1.0


def _against(own: float, grid: float, spread: float, digits: int) -> str:
    """A loss against the grid's: in percent, or both where that would divide by nearly nothing.

    A target without noise leaves nearly no loss beside its own `spread`.
    """
    if grid < 1e-6 * spread:
        return f"{own:.2g} against {grid:.2g}"
    return f"{100 * (own / grid - 1):+.{digits}f} %"


def _verdict(table: Table, result: dict[str, Any]) -> str:
    """Whether the tuned penalties generalised better than the best single one of the grid."""
    tuned = "penalty" if result["penalty"] == "single" else "penalties"
    own, grid = result["test_loss"], result["baselines"]["single"]["test_loss"]
    how = "better than" if own < grid else "worse than"
    if abs(own - grid) < 1e-3 * grid:
        how = "as well as"
    return (
        f"On the test split, the tuned {tuned} generalised {how} the best of a grid of {NUM_FINE} single "
        f"penalties (test loss {_against(own, grid, _spread(table), 1)}); one split is one draw."
    )


def _strongest(penalties: list[dict[str, Any]]) -> str:
    """The ends of the list of penalties, in words."""
    name = "group" if "group" in penalties[0] else "feature"
    order = sorted(penalties, key=lambda item: item["penalty"])
    ends = [f"{item[name]} {output.short(item['penalty'])}" for item in (order[0], order[-1])]
    return (
        f"\nWeakest penalty: {ends[0]}; strongest: {ends[1]} (for features of unit variance; all of "
        "them are in result.json)."
    )
