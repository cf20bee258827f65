"""`bilevel clean`: one weight per training example, learned on a few trusted ones."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.tuning import engines, output
from bilevel.tuning.clean_fits import Fit, Part, baselines, choose, raw_model
from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.data import Table
from bilevel.tuning.output import Outcome
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import CleanSplit, flip_labels

NUM_STEPS = 10
"""Outer steps. More of them fit the trusted examples ever better and the test set worse."""

LEARNING_RATE = 0.06
"""Each step moves the logits of the weights by this much, in the root mean square, before momentum.

The gradient is rescaled as a whole: Adam would move an example without influence as far as one with.
"""

KEEP = 0.5
"""An example is kept when its weight ends above this; all weights start here."""


class Cleaned(NamedTuple):
    """Weights of the training examples, the refit with them, and how the run ended."""

    weights: np.ndarray
    fit: Fit
    status: bl.Status


def learn(rows: Rows, used: np.ndarray, engine: str) -> Any:
    """Weights of the training examples from the trusted rows in use; a result of `bilevel.run`."""
    rescale = optax.normalize_by_update_norm(math.sqrt(rows.num_train))
    return engines.check(
        bl.run(
            rows.problem(used),
            jnp.full(rows.num_train, KEEP),
            rows.start,
            num_steps=NUM_STEPS,
            chunk=NUM_STEPS,
            progress=False,
            throw=False,
            solver=engines.inner_solver(engine),
            engine=engines.make_engine(engine),
            outer=optax.chain(rescale, optax.sgd(LEARNING_RATE, momentum=0.9)),
            transform=bl.transforms.Sigmoid(),
        )
    )


def optimise(rows: Rows, engine: str, say: Callable[[str], None]) -> Cleaned:
    """Learn the weights on all trusted rows; choose a penalty; refit with weights and trusted rows.

    For the choice, the weights are learned anew on each part of the trusted rows: those learned on
    all of them have seen the rows that judge.
    """
    parts, statuses = [], []
    for fold in range(rows.num_folds):
        held_out = rows.fold == fold
        found = learn(rows, ~held_out, engine)
        statuses.append(found.status)
        parts.append(Part(np.concatenate([found.lam, ~held_out]), held_out))
        say(f"weights learned without fold {fold + 1} of {rows.num_folds} of the trusted examples")
    choice = choose(rows, parts)
    say(
        f"penalty {choice.penalty:.3g}: loss {choice.held_out_loss:.4f} on held-out trusted examples"
    )
    everything = np.ones(rows.num_trusted, bool)
    found = learn(rows, everything, engine)
    weights = np.asarray(found.lam)
    w = rows.fit(np.concatenate([weights, everything]), choice.penalty, found.w)
    return Cleaned(weights, Fit(choice, w), max([*statuses, found.status]))


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
    entries: list[tuple[str, dict[str, Any]]] = [
        ("cleaned", {**result, **result["hyperparameters"]}),
        *((names[name], found) for name, found in result["baselines"].items()),
    ]
    lines = [
        [
            name,
            output.short(found["penalty"]),
            output.fixed(found["cv_loss"]),
            output.fixed(found["test_loss"]),
            output.fixed(found["test_accuracy"]),
        ]
        for name, found in entries
    ]
    header = [f"{table.name}, {engine}", "penalty", "trusted loss", "test loss", "test accuracy"]
    weights = result["hyperparameters"]["weights"]
    ending = ""
    if result["f1_kept"] is not None:
        ending = (
            f" (F1 of the kept {result['f1_kept']:.3f}, of the thrown {result['f1_thrown']:.3f})"
        )
    return (
        f"\n{output.table(header, lines)}\n\n"
        f"kept {weights['kept']} of {weights['count']} training examples{ending}; status "
        f"{result['status']}; {result['seconds']['cold']:.2f} s with compilation, "
        f"{result['seconds']['warm']:.2f} s without."
    )
