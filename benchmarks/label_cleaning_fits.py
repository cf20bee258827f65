"""Weighted fits: what the cleaned labels are worth, and the baselines with tuned penalties."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from label_cleaning_data import Rows
from label_cleaning_engines import losses
from label_cleaning_models import scores, squares

import bilevel as bl

PENALTIES = np.geomspace(1e-5, 1.0, 11)
"""Factors of ||w||^2 that the baselines choose from."""


def weighted(w, lam, batch):
    fit = jnp.sum(batch["weight"] * losses(w, batch)) / jnp.sum(batch["weight"])
    return fit + lam * squares(w)


def nothing(w, lam, batch):
    return jnp.zeros(())


class Fit(eqx.Module):
    """Fits to one set of rows, by one compiled program whatever the weights and the penalty."""

    X: jax.Array
    solver: bl.LBFGS = eqx.field(default_factory=lambda: bl.LBFGS(max_steps=500, tol=1e-4))

    def __call__(self, y, weights, penalty, w):
        data = {"X": self.X, "y": jnp.asarray(y), "weight": jnp.asarray(weights, jnp.float32)}
        problem = bl.Problem(weighted, nothing, data)
        engine = bl.Implicit(estimate=False)
        lam = jnp.float32(penalty)
        return bl.hypergradient(problem, lam, w, solver=self.solver, engine=engine, throw=False).w


def accuracy(w, rows: dict) -> float:
    return float(np.mean(np.asarray(scores(w, rows["X"])).argmax(axis=1) == rows["y"]))


def loss(w, rows: dict) -> float:
    return float(jnp.mean(losses(w, rows)))


def baselines(rows: Rows, start) -> dict[str, dict[str, float]]:
    """Noisy labels, trusted rows alone, both, true labels; penalties by the accuracy on held-out trusted rows.

    Held out are the four quarters in turn, of more than 1000 rows one of them (the noisy and the true labels are
    judged by all trusted rows). Among equals the strongest penalty is taken; of more
    than 2000 training rows, and of the network, the grid ends at 1e-4 and .1. Fits begin at `start`.
    """
    n, m = len(rows.truth), len(rows.trusted["y"])
    fit = Fit(jnp.asarray(np.concatenate([rows.train["X"], rows.trusted["X"]])))
    given = np.concatenate([rows.train["y"], rows.trusted["y"]])
    true = np.concatenate([rows.truth, rows.trusted["y"]])
    quarter = np.arange(m) % 4
    quarters = [quarter == k for k in range(4 if m <= 1000 else 1)]
    few = n <= 2000 and not isinstance(start, dict)
    penalties = PENALTIES if few else PENALTIES[2:9]
    both = lambda train, trusted: np.concatenate([np.full(n, train), trusted]).astype(np.float32)
    none, all_ = np.zeros(m), np.ones(m)
    plans = {
        "noisy": (given, 1.0, None),
        "trusted": (given, 0.0, quarters),
        "both": (given, 1.0, quarters),
        "true labels": (true, 1.0, None),
    }
    found = {}
    for name, (y, train, parts) in plans.items():
        held = [np.ones(m, bool)] if parts is None else parts
        use = lambda out, parts=parts: none if parts is None else 1.0 - out
        models, trials = [start] * len(held), []
        for penalty in penalties[::-1]:
            models = [
                fit(y, both(train, use(out)), penalty, w)
                for out, w in zip(held, models, strict=True)
            ]
            right = sum(
                accuracy(w, jax.tree.map(lambda leaf, out=out: leaf[out], rows.trusted)) * out.sum()
                for out, w in zip(held, models, strict=True)
            )
            trials.append((right, penalty))
        _, penalty = max(trials)
        w = fit(y, both(train, none if parts is None else all_), penalty, start)
        found[name] = {"penalty": float(penalty), "accuracy": accuracy(w, rows.test)}
    return found


@functools.cache
def counted(inner, outer):
    """The losses, counting how often they are evaluated on the host, and the counter."""
    count = {"inner": 0, "outer": 0}

    def counter(name, fn):
        def loss(w, lam, batch):
            jax.debug.callback(lambda: count.__setitem__(name, count[name] + 1))
            return fn(w, lam, batch)

        return loss

    return counter("inner", inner), counter("outer", outer), count
