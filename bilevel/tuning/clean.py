"""`bilevel clean`: one weight per training example, learned on a few trusted ones.

Hypergradients give each training example a weight; a model fitted with these weights and the trusted
examples takes a second look: the final weight of an example is the calibrated probability which that
model gives to its label.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.tuning import output
from bilevel.tuning.clean_findings import (
    KEEP,
    NAMES,
    SIMPLE,
    judge,
    selection_scores,
    suspects,
    suspects_csv,
)
from bilevel.tuning.clean_fits import Fit, Part, Plan, baselines, fit, raw_model, second_look
from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.data import Table
from bilevel.tuning.output import Outcome
from bilevel.tuning.scores import log_probabilities, scores
from bilevel.tuning.splits import CleanSplit, flip_labels
from bilevel.tuning.steps import Steps, run_steps, step_fields, timed, took

NUM_STEPS = 10
"""Outer steps. On digits four times as many give the same accuracy (`benchmarks/cleaning.py --steps 40`)."""

LEARNING_RATE = 0.06
"""Each step moves the logits of the weights by this much, in the root mean square, before momentum.

The gradient is rescaled as a whole: Adam would move an example without influence as far as one with.
"""

START = 0.5
"""Where all weights start."""

NUM_SHOWN = 20
"""Suspects in the printed table; the files list all."""


class Cleaned(NamedTuple):
    """Weights of the training examples, the refit with them, and how the run ended."""

    weights: np.ndarray
    learned: np.ndarray
    """The weights before the second look."""
    predicted: np.ndarray
    """Class of each training example by the model that takes the second look."""
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
        jnp.full(rows.num_train, START),
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
    """Learn the weights, refit with them and the trusted rows, take a second look, refit.

    Each refit chooses its penalty on held-out trusted rows. For that the weights are learned anew on
    each part of the trusted rows: those learned on all of them have seen the rows that judge. Runs
    that follow an interrupted one take no step.
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
    learned = np.asarray(runs[0].lam)
    plan = Plan(parts, np.concatenate([learned, everything]))
    first = fit(rows, plan)
    say(f"refit with the learned weights: held-out trusted loss {first.choice.held_out_loss:.4f}")
    plan = second_look(rows, plan, first)
    second = fit(rows, plan)
    say(f"refit after a second look: held-out trusted loss {second.choice.held_out_loss:.4f}")
    # One word for all runs: the worst status, and whether any of them was interrupted.
    stopped = "interrupted" if _interrupted(runs) else runs[0].stopped
    return Cleaned(
        weights=plan.weights[: rows.num_train],
        learned=learned,
        predicted=rows.predictor(first.w)[: rows.num_train].argmax(axis=1),
        fit=second,
        steps=Steps(runs[0].history, max(run.status for run in runs), stopped),
    )


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
    listed = suspects(table, split.train, labels, cleaned.predicted, cleaned.weights)
    selected = {
        **selection_scores(kept, ~wrong, "kept"),
        **selection_scores(~kept, wrong, "thrown"),
    }
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
        **(selected if flip > 0 else dict.fromkeys(selected)),
        **judge(rows, cleaned.fit.choice, {name: fits[name].choice for name in SIMPLE}),
        "baselines": {
            name: {
                "penalty": found.choice.penalty,
                "cv_loss": found.choice.held_out_loss,
                **_test_scores(table, split, raw_model(rows, found)),
            }
            for name, found in fits.items()
        },
        "suspects": listed,
    }
    arrays = {
        **model,
        "classes": table.classes,
        "features": np.asarray(table.features),
        "penalty": np.asarray(cleaned.fit.choice.penalty),
        "weights": cleaned.weights,
        "learned_weights": cleaned.learned,
        "predicted": cleaned.predicted,
        "kept": kept,
        "labels": labels,
        "flipped": wrong,
        "train_rows": split.train,
        "trusted_rows": split.trusted,
        "test_rows": split.test,
    }
    text = _text(table, engine, result)
    return Outcome(result, arrays, text, table.target, {"suspects.csv": suspects_csv(listed)})


def _test_scores(
    table: Table, split: CleanSplit, model: dict[str, np.ndarray]
) -> dict[str, float | None]:
    f = table.X[split.test] @ model["coef"] + model["intercept"]
    return scores(table, log_probabilities(f, "softmax"), table.y[split.test])


def _summary(weights: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(weights),
        "kept": int(kept.sum()),
        "min": float(weights.min()),
        "mean": float(weights.mean()),
        "max": float(weights.max()),
    }


def _text(table: Table, engine: str, result: dict[str, Any]) -> str:
    entries: list[tuple[str, dict[str, Any]]] = [
        ("cleaned", {**result, **result["hyperparameters"]}),
        *((NAMES[name], found) for name, found in result["baselines"].items()),
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
        ending = "".join(
            f"; of the {what} precision {result[f'precision_{what}']:.3f}, recall "
            f"{result[f'recall_{what}']:.3f}, F1 {result[f'f1_{what}']:.3f}"
            for what in ("kept", "thrown")
        )
    return (
        f"\n{output.table(header, lines)}\n\n{_suspects_text(result['suspects'])}"
        f"kept {weights['kept']} of {weights['count']} training examples{ending}; status "
        f"{result['status']}; {took(result['seconds'])}.\n\nverdict: {result['verdict']}"
    )


def _suspects_text(listed: list[dict[str, Any]]) -> str:
    if not listed:
        return ""
    shown = listed[:NUM_SHOWN]
    header = ["suspect row", "given", "predicted", "weight"]
    lines = [
        [str(one["row"]), str(one["given"]), str(one["predicted"]), f"{one['weight']:.2g}"]
        for one in shown
    ]
    rest = f"... and {len(listed) - len(shown)} more\n" if len(listed) > len(shown) else ""
    return f"{output.table(header, lines)}\n{rest}\n"
