"""What a cleaning found: which labels are suspect, how well that is right, whether it pays."""

import csv
import io
import math
from typing import Any

import numpy as np

from bilevel.tuning.clean_fits import Choice
from bilevel.tuning.clean_rows import Rows
from bilevel.tuning.data import Table
from bilevel.tuning.scores import log_probabilities

KEEP = 0.5
"""An example is kept when its final weight is above this."""

NAMES = {
    "noisy": "all training labels as they are",
    "trusted": "the trusted examples alone",
    "pooled": "both together",
    "self_trained": "both, looked at a second time",
    "oracle": "all training labels put right",
}
"""Baselines in words."""

SIMPLE = ("noisy", "trusted", "pooled")
"""Baselines that question no label."""


def suspects(
    table: Table, train: np.ndarray, labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray
) -> list[dict[str, Any]]:
    """Training rows that are not kept, the least weight first.

    `row` counts the rows of the table from 0, a header not counted; `predicted` is the class by the
    model that gave the weight.
    """
    assert table.classes is not None
    order = np.argsort(weights, kind="stable")
    return [
        {
            "row": int(train[i]),
            "given": table.classes[labels[i]],
            "predicted": table.classes[predicted[i]],
            "weight": float(weights[i]),
        }
        for i in order[weights[order] <= KEEP]
    ]


def suspects_csv(found: list[dict[str, Any]]) -> str:
    """The suspects as comma-separated values with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["row", "given", "predicted", "weight"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def selection_scores(found: np.ndarray, true: np.ndarray, what: str) -> dict[str, float]:
    """Precision, recall and their harmonic mean F1 of a selection; 1 where there is nothing to miss."""
    hits, num_found, num_true = (int(a.sum()) for a in (found & true, found, true))

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 1.0

    return {
        f"precision_{what}": share(hits, num_found),
        f"recall_{what}": share(hits, num_true),
        f"f1_{what}": share(2 * hits, num_found + num_true),
    }


def judge(rows: Rows, cleaned: Choice, others: dict[str, Choice]) -> dict[str, Any]:
    """Whether cleaning pays, from the trusted examples alone; no test row is looked at.

    Compares held-out losses of the same trusted examples, with the cleaned model and with the best of
    `others`; the standard error is that of the mean of the paired differences. Each loss is a little
    too good, since the penalty was chosen on the same examples: the same for all.
    """
    cases = np.arange(rows.num_trusted)
    losses = {
        name: -log_probabilities(choice.predictor, "softmax")[cases, rows.trusted_y]
        for name, choice in {**others, "cleaned": cleaned}.items()
    }
    best = min(others, key=lambda name: float(losses[name].mean()))
    gain = losses[best] - losses["cleaned"]
    mean, error = float(gain.mean()), float(gain.std(ddof=1)) / math.sqrt(len(gain))
    if mean > 2 * error:
        opinion = "cleaning pays"
    elif mean < -2 * error:
        opinion = f"cleaning does not pay, take {NAMES[best]}"
    else:
        opinion = (
            f"cannot tell whether cleaning pays, {NAMES[best]} may do as well; more trusted "
            "examples would tell"
        )
    sentence = (
        f"{opinion} (held-out loss of {len(gain)} trusted examples: {losses['cleaned'].mean():.3f} "
        f"cleaned, {losses[best].mean():.3f} with {NAMES[best]}; difference {mean:.3f}, standard "
        f"error {error:.3f})"
    )
    return {
        "verdict": sentence,
        "held_out": {"alternative": best, "gain": mean, "standard_error": error},
    }
