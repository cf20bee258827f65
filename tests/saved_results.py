"""Results of imaginary runs, in the form in which `tune` and `clean` write them."""

import json
from pathlib import Path

import numpy as np

from bilevel.tuning.data import load_table
from bilevel.tuning.output import plain
from bilevel.tuning.results import Saved

ADVICE = {"OK": "OK: converged.", "MAX_STEPS": "MAX_STEPS: the step budget ran out. Try more."}


def head(command: str) -> dict:
    return {
        "command": command,
        "argv": [command, "digits", "--out", "a b"],
        "data": "digits",
        "target": "target",
        "seed": 3,
        "engine": "implicit",
        "versions": {"python": "3.11", "jax": "0.10"},
        "task": "softmax",
        "seconds": {"cold": 2.5, "warm": 0.5},
        "status": "OK",
        "stopped": "num_steps",
        "outer_steps": 4,
        "history": {
            "objective": [0.4, 0.3, 0.25, 0.24],
            "grad_norm": [1.5, 0.2, 0.03, 0.004],
            "error_estimate": [None, None, None, 2e-5],
            "status": ["OK", "OK", "MAX_STEPS", "OK"],
            "advice": ADVICE,
        },
    }


def tune_result(penalties: bool = True) -> Saved:
    """A softmax model of digits; its coefficients are random."""
    table = load_table("digits", None)
    rng = np.random.default_rng(0)
    baseline = {"penalty": 1e-3, "cv_loss": 0.26, "test_loss": 0.21, "test_accuracy": 0.93}
    i, j = np.divmod(np.arange(64), 8)
    values = 10.0 ** (-4 + ((i - 3.5) ** 2 + (j - 3.5) ** 2) / 12)
    pairs = zip(table.features, values.tolist(), strict=True)
    many = {"level": 1e-3, "penalties": [{"feature": f, "penalty": p} for f, p in pairs]}
    result = head("tune") | {
        "rows": {"train": 1348, "test": 449},
        "folds": 5,
        "hyperparameters": many if penalties else {"penalty": 2e-3},
        "cv_loss": 0.24,
        "test_loss": 0.2,
        "test_accuracy": 0.95,
        "baselines": {"untuned": baseline, "sklearn": baseline, "single": baseline},
    }
    arrays = {
        "coef": rng.normal(size=(64, 10)),
        "intercept": rng.normal(size=10),
        "features": np.asarray(table.features),
        "classes": np.arange(10),
    }
    return Saved(result, arrays)


def clean_result() -> Saved:
    """Weights of 300 rows of digits, every tenth of them suspect."""
    table = load_table("digits", None)
    saved = tune_result()
    rng = np.random.default_rng(1)
    weights = np.where(np.arange(300) % 10 == 0, rng.uniform(0, 0.4, 300), rng.beta(8, 2, 300))
    order = np.argsort(weights)[: int(np.sum(weights <= 0.5))]
    suspects = [
        {
            "row": int(row),
            "given": int((table.y[row] + 1) % 10),
            "predicted": int(table.y[row]),
            "weight": float(weights[row]),
        }
        for row in order
    ]
    result = saved.result | head("clean")
    result |= {
        "rows": {"train": 300, "trusted": 50, "test": 100},
        "flip": 0.1,
        "f1_thrown": 0.9,
        "hyperparameters": {
            "penalty": 0.02,
            "weights": {"count": 300, "kept": 300 - len(order)},
        },
        "baselines": {
            name: saved.result["baselines"]["single"]
            for name in ("noisy", "trusted", "pooled", "oracle")
        },
        "suspects": suspects,
    }
    return Saved(result, saved.arrays | {"weights": weights})


def write(saved: Saved, directory: Path) -> Path:
    """Both files in a new directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps(plain(saved.result), allow_nan=False))
    np.savez(directory / "model.npz", **saved.arrays)
    return directory
