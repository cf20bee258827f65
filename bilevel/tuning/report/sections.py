"""What the page says: sections as plain values, each None where the result has nothing for it."""

import math
import shlex
from typing import Any

import numpy as np

from bilevel.tuning import output
from bilevel.tuning.report import charts
from bilevel.tuning.results import Saved

MAX_BARS = 40
"""Penalties shown as bars."""

MAX_IMAGES = 24
"""Suspects shown as images."""

MAX_SUSPECTS = 50
"""Suspects listed in a table."""

OWN = {"tune": "tuned", "clean": "cleaned"}

BASELINES = {
    "untuned": "scikit-learn, default strength",
    "sklearn": "scikit-learn, its own grid and CV",
    "single": "one penalty, the best of a grid",
    "noisy": "all training labels as they are",
    "trusted": "the trusted examples alone",
    "pooled": "training and trusted examples together",
    "self_trained": "both, looked at a second time",
    "oracle": "all training labels put right",
}
"""Baselines in words; an unknown one goes by its name."""


def make_sections(saved: Saved, X: np.ndarray | None) -> dict[str, Any]:
    """All that the template asks for."""
    arrays = saved.arrays
    result = {key: value for key, value in saved.result.items() if value is not None}
    command = str(result.get("command", "run"))
    score, score_name = _score_key(result)
    return {
        "title": f"bilevel {command}: {result.get('data', 'results')}",
        "command": command,
        "summary": _summary(command, result),
        "verdict": _verdict(result, score, score_name),
        "interrupted": result.get("stopped") == "interrupted",
        "facts": _facts(result, score, score_name),
        "steps": _steps(command, result),
        "penalties": _penalties(result, arrays),
        "weights": _weights(result, arrays),
        "suspects": _suspects(result, arrays, X),
        "baselines": _baselines(command, result, score, score_name),
        "statuses": _statuses(result),
        "reproduce": _reproduce(result),
        "chart": charts,
    }


def _score_key(result: dict[str, Any]) -> tuple[str, str]:
    return ("test_r2", "test R²") if "test_r2" in result else ("test_accuracy", "test accuracy")


def _summary(command: str, result: dict[str, Any]) -> str:
    rows = result.get("rows") or {}
    task = result.get("task", "linear")
    if command == "clean":
        flipped = result.get("flip") or 0
        made_wrong = f", {100 * flipped:.0f} % of them made wrong on purpose," if flipped else ""
        return (
            f"One weight for each of {rows.get('train', 'the')} training labels of "
            f"{result.get('data', 'the data')}{made_wrong} was learned so that a {task} regression does well on "
            f"{rows.get('trusted', 'the')} trusted examples; the model was refitted with "
            f"these weights and tested once, on {rows.get('test', 'the other')} rows."
        )
    penalties = "penalties" if "penalties" in _hyperparameters(result) else "penalty"
    return (
        f"The {penalties} of a {task} regression on {result.get('data', 'the data')} (target: {result['target']}) "
        f"followed the hypergradient of the cross-validated loss"
        f"{_over(result)}; the model was refitted on all {rows.get('train', '')} training rows and "
        f"tested once, on {rows.get('test', 'the other')} rows."
    )


def _over(result: dict[str, Any]) -> str:
    return f" over {result['folds']} folds" if "folds" in result else ""


def _hyperparameters(result: dict[str, Any]) -> dict[str, Any]:
    return result.get("hyperparameters") or {}


def _verdict(result: dict[str, Any], score: str, score_name: str) -> str | None:
    """The result's own verdict, or the score against the best honest baseline."""
    verdict = result.get("verdict")
    if isinstance(verdict, str):
        return verdict[:1].upper() + verdict[1:]
    own = result.get(score)
    others = {
        name: found[score]
        for name, found in (result.get("baselines") or {}).items()
        if found.get(score) is not None and name != "oracle"
    }
    if own is None or not others:
        return None
    best = max(others, key=lambda name: others[name])
    gap = own - others[best]
    place = (
        "the same as" if abs(gap) < 5e-5 else f"{abs(gap):.4f} {'above' if gap > 0 else 'below'}"
    )
    return (
        f"{score_name.capitalize()} {output.fixed(own)}, {place} the best baseline "
        f"({BASELINES.get(best, best)}). One split is one draw."
    )


def _facts(result: dict[str, Any], score: str, score_name: str) -> list[tuple[str, str]]:
    found = _hyperparameters(result)
    weights = found.get("weights") or {}
    seconds = (result.get("seconds") or {}).get("cold")
    facts = [
        (score_name, output.fixed(result.get(score))),
        ("test loss", output.fixed(result.get("test_loss"))),
        ("penalty", _number(found.get("penalty"))),
        ("mean penalty", _number(found.get("level"))),
        ("kept", f"{weights['kept']} of {weights['count']}" if "kept" in weights else None),
        ("outer steps", result.get("outer_steps")),
        ("status", result.get("status")),
        ("seconds", None if seconds is None else f"{seconds:.1f}"),
    ]
    exponents = found.get("exponents")
    if isinstance(exponents, dict):
        facts[4:4] = [(f"exponent, {name}", _number(value)) for name, value in exponents.items()]
    return [(name, str(value)) for name, value in facts if value is not None]


def _number(value: Any) -> str | None:
    return None if value is None else charts.short(value, 3)


def _steps(command: str, result: dict[str, Any]) -> dict[str, Any] | None:
    """Charts of the objective and of the gradient norm over the outer steps."""
    history = result.get("history")
    if not history or not any(value is not None for value in history.get("objective", [])):
        return None
    count = len(history["objective"])
    statuses = history.get("status") or ["OK"] * count
    errors = history.get("error_estimate") or [None] * count
    norms = history.get("grad_norm") or [None] * count
    bad = [status != "OK" for status in statuses]
    values = [
        f"step {i}: {_number(value)}, {status}"
        for i, (value, status) in enumerate(zip(history["objective"], statuses, strict=True), 1)
    ]
    texts = [
        f"step {i}: {_number(norm)}" + ("" if error is None else f", relative error {error:.1g}")
        for i, (norm, error) in enumerate(zip(norms, errors, strict=True), 1)
    ]
    known = [(i, error) for i, error in enumerate(errors, 1) if error is not None]
    shown = any(norm is not None and norm > 0 for norm in norms)
    return {
        "caption": _objective(command, result),
        "objective": charts.line(history["objective"], values, bad, log=False),
        "norm": charts.line(norms, texts, bad, log=True) if shown else None,
        # Near a minimum the gradient sinks below its own error, which is no fault of the run.
        "errors": [
            (i, f"{error:.1g}" + (" (the norm is below its error)" if error >= 1 else ""))
            for i, error in known
        ],
        "bad": sum(bad),
    }


def _objective(command: str, result: dict[str, Any]) -> str:
    """What the objective is, and how it differs from the losses in the table."""
    if command == "clean":
        return "Loss on the trusted examples at each step"
    text = "Cross-validated loss at each step"
    if result.get("task") == "ridge":
        text += ", in units of the target's variance"
    pilot = (result.get("evaluations") or {}).get("pilot")
    if pilot and "penalties" in _hyperparameters(result):
        text += f" (with a weak prior); up to step {pilot} one penalty for all, then many"
    return text


def _penalties(result: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Penalties by feature or group: an image where the features are pixels, bars otherwise."""
    found = _hyperparameters(result).get("penalties")
    if not found:
        return None
    if isinstance(found, dict):
        pairs = [(str(name), float(value)) for name, value in found.items()]
    else:
        pairs = [
            (str(item.get("feature", item.get("group"))), float(item["penalty"])) for item in found
        ]
    logs = {name: math.log10(value) for name, value in pairs if value > 0}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
    ends = charts.short(10**low), charts.short(10**high)
    features = arrays["features"].tolist()
    shape = charts.pixel_shape(features)
    if shape is not None and set(features) == set(logs):
        values = np.array([logs[name] for name in features]).reshape(shape)
        return {"image": charts.image(values, low, high), "ends": ends, "bars": [], "left_out": 0}
    span = high - low if high > low else 1.0
    pairs.sort(key=lambda pair: pair[1])
    bars = [
        (name, 4 + 96 * (logs.get(name, low) - low) / span, charts.short(value))
        for name, value in pairs[:MAX_BARS]
    ]
    return {"image": None, "ends": ends, "bars": bars, "left_out": len(pairs) - len(bars)}


def _weights(result: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """The histogram of the weights."""
    weights = arrays.get("weights")
    if weights is None or weights.ndim != 1 or weights.dtype.kind != "f" or not len(weights):
        return None
    note = f" {int(np.sum(weights > 0.5))} of {len(weights)} are kept."
    if result.get("f1_thrown") is not None:
        note += (
            f" The labels made wrong on purpose are found with an F1 score of "
            f"{result['f1_thrown']:.3f}."
        )
    return {"histogram": charts.histogram(weights, 0.5), "note": note}


def _suspects(
    result: dict[str, Any], arrays: dict[str, np.ndarray], X: np.ndarray | None
) -> dict[str, Any] | None:
    """The training rows of least weight: as images where the features are pixels, else as a table."""
    found = result.get("suspects")
    if not found:
        return None
    shape = charts.pixel_shape(arrays["features"].tolist())
    rows = [
        {
            "row": int(item["row"]),
            "given": str(item.get("given")),
            "predicted": str(item["predicted"]) if item.get("predicted") is not None else None,
            "weight": f"{item['weight']:.2g}",
        }
        for item in found
    ]
    images = []
    if shape is not None and X is not None and X.shape[1] == shape[0] * shape[1]:
        high = float(X.max())
        for row in rows[:MAX_IMAGES]:
            if 0 <= row["row"] < len(X):
                pixels = X[row["row"]].reshape(shape)
                images.append(row | {"image": charts.image(pixels, float(X.min()), high)})
    return {"images": images, "rows": rows[:MAX_SUSPECTS], "count": len(rows)}


def _baselines(
    command: str, result: dict[str, Any], score: str, score_name: str
) -> dict[str, Any] | None:
    """The table of scores, the run's own row first."""
    found = result.get("baselines")
    if not found:
        return None
    hyperparameters = _hyperparameters(result)
    own = result | {"penalty": hyperparameters.get("penalty", hyperparameters.get("level"))}
    loss = "loss on held-out trusted examples" if command == "clean" else "cross-validated loss"

    def line(name: Any, row: dict[str, Any]) -> list[str]:
        numbers = [output.fixed(row.get(key)) for key in ("cv_loss", "test_loss", score)]
        return [name, _number(row.get("penalty")) or "–", *numbers]

    return {
        "header": [
            "",
            "mean penalty" if "level" in hyperparameters else "penalty",
            loss,
            "test loss",
            score_name,
        ],
        "own": line(OWN.get(command, command), own),
        "rows": [line(BASELINES.get(name, name), row) for name, row in found.items()],
    }


def _statuses(result: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(status, how many steps, what it means), the most frequent first."""
    history = result.get("history") or {}
    statuses, advice = history.get("status") or [], history.get("advice") or {}
    counts = {status: statuses.count(status) for status in statuses}
    # The advice starts with the status itself.
    return [
        (status, count, str(advice.get(status, "")).partition(": ")[2])
        for status, count in sorted(counts.items(), key=lambda pair: -pair[1])
    ]


def _reproduce(result: dict[str, Any]) -> dict[str, Any]:
    argv = result.get("argv")
    return {
        "line": None if argv is None else shlex.join(["bilevel", *map(str, argv)]),
        "seed": result.get("seed"),
        "engine": result.get("engine"),
        "versions": ", ".join(f"{k} {v}" for k, v in (result.get("versions") or {}).items()),
    }
