"""`bilevel clean`: one weight per training example, learned on a few trusted ones."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.tuning import output
from bilevel.tuning.clean_fits import Fit, Part, baselines, choose, raw_model
from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.data import Table
from bilevel.tuning.output import Outcome
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import CleanSplit, flip_labels
from bilevel.tuning.steps import Steps, run_steps, step_fields, timed, took

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
    steps: Steps


def learn(
    rows: Rows,
    used: np.ndarray,
    engine: str,
    say: Callable[[str], None],
    *,
    num_steps: int = NUM_STEPS,
    progress: bool = False,
) -> bl.Result:
    """Weights of the training examples from the trusted rows in use."""
    rescale = optax.normalize_by_update_norm(math.sqrt(rows.num_train))
    return run_steps(
        rows.problem(used),
        jnp.full(rows.num_train, KEEP),
        rows.start,
        engine=engine,
        num_steps=num_steps,
        say=say,
        progress=progress,
        outer=optax.chain(rescale, optax.sgd(LEARNING_RATE, momentum=0.9)),
        transform=bl.transforms.Sigmoid(),
    )


def optimise(
    rows: Rows, engine: str, say: Callable[[str], None], *, progress: bool = False
) -> Cleaned:
    """Learn the weights on all trusted rows; choose a penalty; refit with weights and trusted rows.

    For the choice, the weights are learned anew on each part of the trusted rows: those learned on
    all of them have seen the rows that judge. Runs that follow an interrupted one take no step.
    """
    everything = np.ones(rows.num_trusted, bool)
    runs = [learn(rows, everything, engine, say, progress=progress)]
    say("weights learned on all trusted examples")
    parts = []
    for fold in range(rows.num_folds):
        held_out = rows.fold == fold
        num_steps = 0 if _interrupted(runs) else NUM_STEPS
        found = learn(rows, ~held_out, engine, say, num_steps=num_steps, progress=progress)
        runs.append(found)
        parts.append(Part(np.concatenate([found.lam, ~held_out]), held_out))
        say(f"weights learned without fold {fold + 1} of {rows.num_folds} of the trusted examples")
    choice = choose(rows, parts)
    say(
        f"penalty {choice.penalty:.3g}: loss {choice.held_out_loss:.4f} on held-out trusted examples"
    )
    weights = np.asarray(runs[0].lam)
    w = rows.fit(np.concatenate([weights, everything]), choice.penalty, runs[0].w)
    # One word for all runs: the worst status, and whether any of them was interrupted.
    stopped = "interrupted" if _interrupted(runs) else runs[0].stopped
    steps = Steps(runs[0].history, max(run.status for run in runs), stopped)
    return Cleaned(weights, Fit(choice, w), steps)


def _interrupted(runs: list[bl.Result]) -> bool:
    return any(run.stopped == "interrupted" for run in runs)


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
    cleaned, seconds = timed(functools.partial(optimise, rows, engine), say)
    say("baselines with their penalties chosen on the trusted examples")
    fits = baselines(rows, truth if flip > 0 else None)
    kept = cleaned.weights > KEEP
    model = raw_model(rows, cleaned.fit)
    result = {
        "task": "softmax",
        "rows": {"train": rows.num_train, "trusted": rows.num_trusted, "test": len(split.test)},
        "flip": flip,
        "seconds": seconds,
        **step_fields(cleaned.steps),
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
        f"{result['status']}; {took(result['seconds'])}."
    )
