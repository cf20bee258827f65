"""Half of the labels of 1000 digits are wrong; weights learned on 100 trusted digits find out which.

Outer variable: one weight in (0, 1) for each training digit. Inner problem: weighted softmax regression.
Judged on unseen digits, against training on all the noisy labels and on the trusted digits alone, each
with a penalty tuned on the trusted digits.

Full run, 3 seeds: test accuracy 0.923 cleaned, 0.827 noisy, 0.889 trusted.
"""

import jax.numpy as jnp
import numpy as np
import optax
from common import BLUE, GREY, ORANGE, figure, options, save
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

import bilevel as bl

ROWS, TRUSTED, PENALTY = 1000, 100, 3e-3
GRID = np.geomspace(1e-2, 1e2, 7)  # scikit-learn's C of the baselines


def cross_entropies(w, batch):
    logits = batch["X"] @ w["coef"] + w["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def inner(w, weights, batch):
    """Train on the weighted noisy labels; the penalty on the bias makes its solution unique."""
    squares = sum(jnp.sum(leaf**2) for leaf in w.values())
    return jnp.mean(weights * cross_entropies(w, batch)) + 0.5 * PENALTY * squares


def outer(w, weights, batch):
    """Fit the trusted labels."""
    return jnp.mean(cross_entropies(w, batch))


def baselines(train, trusted, test):
    """Test accuracies of the noisy and of the trusted labels, penalties tuned on the trusted ones."""
    fits = [LogisticRegression(C=C, max_iter=5000).fit(train["X"], train["y"]) for C in GRID]
    chances = [fit.predict_log_proba(trusted["X"])[range(TRUSTED), trusted["y"]] for fit in fits]
    noisy = fits[int(np.argmax(np.mean(chances, axis=1)))]
    alone = LogisticRegressionCV(
        Cs=GRID,
        l1_ratios=(0,),
        cv=3,
        scoring="accuracy",
        use_legacy_attributes=False,
        max_iter=5000,
    ).fit(trusted["X"], trusted["y"])
    return {
        "noisy": noisy.score(test["X"], test["y"]),
        "trusted": alone.score(test["X"], test["y"]),
    }


def main(argv=None):
    args = options(__file__, __doc__, argv)
    X, y = load_digits(return_X_y=True)
    X = np.float32(X / 16)
    found = {"noisy": [], "trusted": [], "cleaned": [], "told_apart": []}
    for seed in range(args.seed, args.seed + (1 if args.quick else 3)):
        rng = np.random.default_rng(seed)
        parts = np.split(rng.permutation(len(X)), [ROWS, ROWS + TRUSTED])
        train, trusted, test = ({"X": X[rows], "y": y[rows]} for rows in parts)
        wrong = rng.random(ROWS) < 0.5
        train["y"] = np.where(wrong, (train["y"] + rng.integers(1, 10, ROWS)) % 10, train["y"])

        result = bl.run(
            bl.Problem(inner, outer, train, trusted),
            jnp.full(ROWS, 0.5),
            {"coef": jnp.zeros((64, 10)), "bias": jnp.zeros(10)},
            transform=bl.transforms.Sigmoid(),
            solver=bl.LBFGS(max_steps=200),
            outer=optax.adam(0.3),
            num_steps=50,
        )
        weights = np.asarray(result.lam)
        predicted = (test["X"] @ result.w["coef"] + result.w["bias"]).argmax(1)
        found["cleaned"].append(float(np.mean(predicted == test["y"])))
        found["told_apart"].append(float(np.mean((weights < 0.5) == wrong)))
        for name, score in baselines(train, trusted, test).items():
            found[name].append(float(score))

    mean = {name: float(np.mean(values)) for name, values in found.items()}
    labels = {
        "noisy": f"{ROWS} noisy labels, tuned penalty",
        "trusted": f"{TRUSTED} trusted labels, tuned penalty",
        "cleaned": "weights learned on the trusted labels",
    }
    print(f"test accuracy, mean of {len(found['noisy'])} seeds")
    for name, label in labels.items():
        print(f"{label:40s} {mean[name]:.3f}")
    print(f"right and wrong labels told apart: {mean['told_apart']:.3f}")

    picture = figure(9, 3.8)
    sheet, side = picture.subfigures(1, 2, width_ratios=(3, 2))
    for panel, row in zip(sheet.subplots(3, 8).flat, np.argsort(weights), strict=False):
        panel.imshow(train["X"][row].reshape(8, 8), cmap="gray_r")
        color, mark = (BLUE, "wrong") if wrong[row] else (ORANGE, "right")
        panel.set_title(f"“{train['y'][row]}”\n{mark}", color=color, fontsize=9)
        panel.set(xticks=[], yticks=[])
    sheet.suptitle("Lowest weights (last seed): given label, and whether it was right", fontsize=10)
    panel = side.subplots()
    bars = panel.barh(list(labels), [mean[name] for name in labels], color=[GREY, GREY, BLUE])
    panel.bar_label(bars, fmt="%.3f", padding=3)
    panel.set(xlim=(0.5, 1.05))
    panel.set_title(f"Test accuracy, mean of {len(found['noisy'])} seeds", fontsize=10)
    panel.invert_yaxis()
    save(picture, args.picture)
    return {"seeds": len(found["noisy"]), "trusted_rows": TRUSTED, "mean": mean, **found}


if __name__ == "__main__":
    main()
