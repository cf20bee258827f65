"""Ridge regression with one penalty, one per group of columns, and one per column, against RidgeCV.

Outer variable: the penalties. Data: diabetes, 10 measurements, beside 100 columns of noise. All
penalties are tuned on the score of one 5-fold cross-validation, and judged on rows that nothing saw.

Full run, 6 splits: test error 0.512 with a penalty per group, 0.640 for RidgeCV (one penalty: 0.643). A
free penalty per column has the best cross-validated score, 0.430, and the worst test error, 0.655.
"""

import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREY, ORANGE, figure, options, save
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV

import bilevel as bl

FOLDS, NOISE = 5, 100
GROUPS = {  # the penalty of each column
    "one": np.zeros(10 + NOISE, int),
    "per_group": np.repeat([0, 1], [10, NOISE]),
    "per_column": np.arange(10 + NOISE),
}


def squared_errors(w, batch):
    """Half squared errors of each fold's model on each row, (folds, rows)."""
    return 0.5 * (w["coef"] @ batch["X"].T + w["bias"][:, None] - batch["y"]) ** 2


def inner(w, lam, batch):
    """Each model on the rows its fold does not hold out; their solutions do not depend on each other."""
    fit = jnp.where(batch["held_out"], 0.0, squared_errors(w, batch)).sum() / len(batch["y"])
    return fit + 0.5 * jnp.sum(lam[batch["group"]] * w["coef"] ** 2)


def outer(w, lam, batch):
    """The cross-validation score: each row by the model that did not see it."""
    return jnp.where(batch["held_out"], squared_errors(w, batch), 0.0).sum() / len(batch["y"])


def tune(X, y, group):
    """The tuned run; the last of its models holds nothing out: it is the refit on all rows."""
    held_out = np.arange(FOLDS + 1)[:, None] == np.arange(len(y)) % FOLDS
    data = {"X": X, "y": y, "held_out": held_out, "group": group}
    w = {"coef": jnp.zeros((FOLDS + 1, X.shape[1])), "bias": jnp.zeros(FOLDS + 1)}
    return bl.run(
        bl.Problem(inner, outer, data, data),
        jnp.full(len(group), 0.1),  # one shape for all: the penalties that no column uses stay
        w,
        transform=bl.transforms.Exp(),
        solver=bl.LBFGS(max_steps=300),
        outer=optax.adam(0.2),
    )


def split(seed):
    """Train and test rows, columns scaled by the training rows."""
    X, y = load_diabetes(return_X_y=True)
    rng = np.random.default_rng(seed)
    X = np.hstack([X, rng.normal(size=(len(X), NOISE))])
    order = rng.permutation(len(X))
    train, test = order[:300], order[300:]
    scale = lambda A: ((A - A[train].mean(0)) / A[train].std(0)).astype(np.float32)
    X, y = scale(X), scale(y)
    return X[train], y[train], X[test], y[test]


def main(argv=None):
    args = options(__file__, __doc__, argv)
    found = {"ridge_cv": [], **{name: [] for name in GROUPS}}
    scores, penalties = {name: [] for name in GROUPS}, {}
    for seed in range(args.seed, args.seed + (1 if args.quick else 6)):
        X, y, X_test, y_test = split(seed)
        baseline = RidgeCV(np.logspace(-1, 5, 61)).fit(X, y)
        found["ridge_cv"].append(np.mean((baseline.predict(X_test) - y_test) ** 2))
        for name, group in GROUPS.items():
            result = tune(X, y, group)
            prediction = X_test @ result.w["coef"][-1] + result.w["bias"][-1]
            found[name].append(np.mean((prediction - y_test) ** 2))
            scores[name].append(2 * result.history.outer_value[-1])
            penalties[name] = np.asarray(result.lam)[group]

    ratios = {name: np.divide(found[name], found["ridge_cv"]) for name in GROUPS}
    print(f"squared error (variance of y = 1), mean of {len(found['ridge_cv'])} splits")
    print(f"RidgeCV      test {np.mean(found['ridge_cv']):.3f}")
    for name in GROUPS:
        print(
            f"{name:12s} test {np.mean(found[name]):.3f}  cross-validated "
            f"{np.mean(scores[name]):.3f}  test ratio to RidgeCV {ratios[name].mean():.3f} "
            f"[{ratios[name].min():.3f}, {ratios[name].max():.3f}]"
        )

    picture = figure(9, 3.6)
    left, right = picture.subplots(1, 2)
    at, labels = np.arange(3), ["one penalty\n(as RidgeCV)", "one per group", "one per column"]
    bars = (("cross-validated", scores, GREY, -0.2), ("test", found, BLUE, 0.2))
    for label, values, color, shift in bars:
        heights = [np.mean(values[name]) for name in GROUPS]
        left.bar(at + shift, heights, 0.4, color=color, label=label)
    left.axhline(np.mean(found["ridge_cv"]), color="black", ls="--", lw=1, label="RidgeCV, test")
    left.set(xticks=at, xticklabels=labels, ylabel="mean squared error", ylim=(0, 0.85))
    left.set_title("A penalty per column fits the folds, not the test", fontsize=11)
    left.legend(ncols=3, fontsize=8, loc="upper center")
    styles = {"per_column": (".", ORANGE), "per_group": ("-", BLUE), "one": ("--", GREY)}
    for name, (style, color) in styles.items():
        label = name.replace("_", " ") + (" penalty" if name == "one" else "")
        right.semilogy(penalties[name], style, color=color, drawstyle="steps-mid", label=label)
    right.set(xlabel="column (10 measurements, then 100 of noise)", ylabel="penalty")
    right.set_title("Tuned penalties, last split", fontsize=11)
    right.legend(fontsize=8)
    save(picture, args.picture)
    return {
        "splits": len(found["ridge_cv"]),
        "test_error": {name: float(np.mean(found[name])) for name in found},
        "cross_validated_error": {name: float(np.mean(scores[name])) for name in GROUPS},
        "ratio_to_ridge_cv": {name: ratios[name].tolist() for name in GROUPS},
    }


if __name__ == "__main__":
    main()
