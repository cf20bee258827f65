"""`bilevel predict`: what a saved model says about the rows of a table."""

import io
from typing import Any, NamedTuple

import numpy as np

from bilevel.tuning import output
from bilevel.tuning.data import labels_of, load_frame, numbers
from bilevel.tuning.errors import InputError
from bilevel.tuning.results import Saved
from bilevel.tuning.scores import log_probabilities


class Predictions(NamedTuple):
    """Predictions as CSV text, and a sentence about the score where the target is in the table."""

    csv: str
    score: str | None


def predict(saved: Saved, source: str) -> Predictions:
    """Predictions of the model for a table with its features by name; raises `InputError`.

    The columns may come in any order, and others are ignored. Classes: `prediction`, then the
    probability `p_<class>` of each. Numbers: `prediction`.
    """
    arrays = saved.arrays
    frame = load_frame(source)
    names = [str(name) for name in frame.columns]
    features = arrays["features"].tolist()
    missing = [name for name in features if name not in names]
    if missing:
        raise InputError(
            f"{source!r} lacks {len(missing)} of the {len(features)} features of the model "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}); expected all of them"
        )
    if not len(frame):
        raise InputError(f"{source!r} has no rows; expected at least 1")
    columns = [numbers(frame.iloc[:, names.index(c)], f"column {c!r}") for c in features]
    f = np.stack(columns, axis=1) @ arrays["coef"] + arrays["intercept"]
    target = saved.result["target"]
    truth = frame.iloc[:, names.index(target)] if target in names else None
    classes = arrays.get("classes")
    if classes is None:
        return Predictions(
            _csv({"prediction": f[:, 0]}),
            None if truth is None else _score_numbers(f[:, 0], truth),
        )
    task = "logistic" if f.shape[1] == 1 else "softmax"
    log_p = log_probabilities(f, task)
    table = {"prediction": classes[log_p.argmax(axis=1)]}
    table |= {f"p_{label}": np.exp(log_p[:, i]) for i, label in enumerate(classes.tolist())}
    return Predictions(
        _csv(table), None if truth is None else _score_classes(log_p, classes, truth)
    )


def _csv(columns: dict[str, np.ndarray]) -> str:
    import pandas as pd

    text = io.StringIO()
    pd.DataFrame(columns).to_csv(text, index=False)
    return text.getvalue()


def _score_numbers(prediction: np.ndarray, truth: Any) -> str:
    import pandas as pd

    y = pd.to_numeric(truth.astype(str), errors="coerce").to_numpy(np.float64)
    judged = np.isfinite(y)
    if not judged.any():
        return "no score: no row has a target value"
    error = np.mean(np.square((prediction - y)[judged]))
    y = y[judged]
    text = f"mean squared error {output.fixed(float(error))}"
    if np.ptp(y) > 0:
        text += f", R2 {output.fixed(float(1 - error / np.var(y)))}"
    return f"{text} on {len(y)} rows"


def _score_classes(log_p: np.ndarray, classes: np.ndarray, truth: Any) -> str:
    known = {str(label): i for i, label in enumerate(classes.tolist())}
    index = np.array([known.get(label, -1) for label in labels_of(truth)])
    judged = index >= 0
    if not judged.any():
        return f"no score: no row has one of the {len(classes)} labels of the model"
    log_p, index = log_p[judged], index[judged]
    accuracy = np.mean(log_p.argmax(axis=1) == index)
    loss = -np.mean(log_p[np.arange(len(index)), index])
    text = f"accuracy {output.fixed(float(accuracy))}, log loss {output.fixed(float(loss))}"
    left_out = len(judged) - len(index)
    note = f" ({left_out} rows without a label that the model knows are left out)"
    return f"{text} on {len(index)} rows{note if left_out else ''}"
