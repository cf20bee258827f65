"""Inner problems with a prox, and the hypergradients of some by formulas derived by hand.

`inner` is the smooth part. The outer variable holds logarithms of penalties or bounds. The formulas take
the inner solution w as found and use nothing but its support: with S the support, H the Hessian of the
smooth part and c the outer gradient, H_SS q = c_S.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes

from solvers import prox

GROUPS = np.arange(10) // 2


@dataclasses.dataclass(frozen=True)
class Nonsmooth:
    inner: Callable[..., jax.Array]
    outer: Callable[..., jax.Array]
    inner_prox: Callable[..., Any]
    inner_data: Any
    outer_data: Any
    lam: Any
    w: Any
    by_hand: Callable[..., Any] | None = None
    """`(problem, w) -> hypergradient`."""


def squares(w, lam, batch):
    return 0.5 * jnp.mean((batch["X"] @ w - batch["y"]) ** 2)


def logistic(w, lam, batch):
    f = batch["X"] @ w
    return jnp.mean(jax.nn.softplus(f) - batch["y"] * f)


def _standard(load):
    X, y = load(return_X_y=True)
    return (X - X.mean(0)) / X.std(0), y.astype(float)


def diabetes(noise=0):
    """Halves of the data, with `noise` columns of noise."""
    X, y = _standard(load_diabetes)
    X = np.concatenate([X, np.random.default_rng(0).normal(size=(len(X), noise))], axis=1)
    return _halves(X, (y - y.mean()) / y.std())


def cancer(rows=None):
    X, y = _standard(load_breast_cancer)
    return _halves(X[:rows], y[:rows])


def _halves(X, y):
    return {"X": X[::2], "y": y[::2]}, {"X": X[1::2], "y": y[1::2]}


def _l1(v, step, lam):
    return prox.l1(v, step, jnp.exp(lam))


def _elastic(v, step, lam):
    return prox.elastic_net(v, step, jnp.exp(lam["l1"]), jnp.exp(lam["l2"]))


def _group(v, step, lam):
    return prox.group_lasso(v, step, jnp.exp(lam), GROUPS)


def _restricted(problem, w, free, curvature=0.0):
    """q on the free set, 0 elsewhere, for squares."""
    X, (V, y) = problem.inner_data["X"], problem.outer_data.values()
    H = X.T @ X / len(X) + curvature * np.eye(X.shape[1])
    c = V.T @ (V @ w - y) / len(y)
    q = np.zeros_like(w)
    q[free] = np.linalg.solve(H[np.ix_(free, free)], c[free])
    return q


def _lasso_by_hand(problem, w):
    q = _restricted(problem, w, w != 0)
    each = -np.exp(problem.lam) * np.sign(w) * q
    return each if np.ndim(problem.lam) else each.sum()


def _elastic_by_hand(problem, w):
    l1, l2 = np.exp(problem.lam["l1"]), np.exp(problem.lam["l2"])
    q = _restricted(problem, w, w != 0, l2)
    return {"l1": -l1 * np.sign(w) @ q, "l2": -l2 * w @ q}


def _sparse_logistic_by_hand(problem, w):
    X, (V, y) = problem.inner_data["X"], problem.outer_data.values()
    p = 1 / (1 + np.exp(-X @ w))
    S = w != 0
    H = X[:, S].T * (p * (1 - p)) @ X[:, S] / len(X)
    c = V.T @ (1 / (1 + np.exp(-V @ w)) - y) / len(y)
    return -np.exp(problem.lam) * np.sign(w[S]) @ np.linalg.solve(H, c[S])


def svm_inner(r, lam, batch):
    """The dual of the hinge loss: `|Z'r|^2 / 2 - sum r`, the rows of Z are y_i x_i."""
    return 0.5 * jnp.sum((batch["Z"].T @ r) ** 2) - jnp.sum(r)


def svm_outer(r, lam, batch):
    """Squared error of the primal solution Z'r, linear in r."""
    return 0.5 * jnp.mean((batch["X"] @ (batch["Z"].T @ r) - batch["y"]) ** 2)


def _svm_box(v, step, lam):
    return prox.box(v, 0.0, jnp.exp(lam))


def svr_inner(a, lam, batch):
    """The smooth part of the dual: `|X'a|^2 / 2 - y'a`."""
    return 0.5 * jnp.sum((batch["X"].T @ a) ** 2) - batch["y"] @ a


def svr_outer(a, lam, batch):
    return 0.5 * jnp.mean((batch["V"] @ (batch["X"].T @ a) - batch["y"]) ** 2)


def _svr_prox(v, step, lam):
    bound = jnp.exp(lam["C"])
    return prox.box(prox.l1(v, step, jnp.exp(lam["epsilon"])), -bound, bound)


def _dual_adjoint(rows, V, y, w, free):
    """`v`, the outer gradient in the primal solution, and q on the free set."""
    v = V.T @ (V @ (rows.T @ w) - y) / len(y)
    q = np.zeros_like(w)
    K = rows @ rows.T
    q[free] = np.linalg.solve(K[np.ix_(free, free)], (rows @ v)[free])
    return rows @ v - K @ q, q


def _svm_by_hand(problem, r):
    C = np.exp(problem.lam)
    Z, V, y = (problem.outer_data[name] for name in ("Z", "X", "y"))
    full = r > C * (1 - 1e-9)
    left, _ = _dual_adjoint(Z, V, y, r, (r > 1e-9 * C) & ~full)
    return C * left[full].sum()


def _svr_by_hand(problem, a):
    C, epsilon = np.exp(problem.lam["C"]), np.exp(problem.lam["epsilon"])
    X, V, y = (problem.outer_data[name] for name in ("X", "V", "y"))
    full, sign = np.abs(a) > C * (1 - 1e-9), np.sign(a)
    left, q = _dual_adjoint(X, V, y, a, (np.abs(a) > 1e-9 * C) & ~full)
    return {"C": C * left[full] @ sign[full], "epsilon": -epsilon * sign @ q}


def simplex_inner(w, lam, batch):
    return 0.5 * w @ batch @ w - jnp.exp(lam["return"]) @ w


def simplex_outer(w, lam, batch):
    return 0.5 * jnp.sum((w - batch) ** 2)


def _simplex(v, step, lam):
    return prox.simplex(v, jnp.exp(lam["total"]))


def _svm():
    train, held_out = cancer(80)
    Z = train["X"] * (2 * train["y"] - 1)[:, None] / 5
    data = {"Z": Z, "X": held_out["X"], "y": 2 * held_out["y"] - 1}
    lam, r = np.log(0.3), np.zeros(len(Z))
    return Nonsmooth(svm_inner, svm_outer, _svm_box, {"Z": Z}, data, lam, r, _svm_by_hand)


def _svr():
    train, held_out = diabetes()
    inner = {"X": train["X"][:40] / 3, "y": train["y"][:40]}
    outer = {"X": inner["X"], "V": held_out["X"], "y": held_out["y"]}
    lam = {"C": np.log(0.5), "epsilon": np.log(0.2)}
    return Nonsmooth(svr_inner, svr_outer, _svr_prox, inner, outer, lam, np.zeros(40), _svr_by_hand)


def _simplex_qp():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(6, 6))
    lam = {"return": rng.normal(size=6) * 0.5, "total": 0.1}
    w = np.full(6, 1 / 6)
    return Nonsmooth(
        simplex_inner, simplex_outer, _simplex, A @ A.T / 6 + 0.1 * np.eye(6), w, lam, w
    )


def _table():
    X, w = diabetes(), np.zeros(10)
    weights = -2.5 + 0.3 * np.sin(np.arange(10))
    elastic = {"l1": -2.5, "l2": -1.0}
    groups = -2.0 + 0.2 * np.sin(np.arange(5))
    logs = (logistic, logistic, _l1)
    return {
        "lasso": Nonsmooth(squares, squares, _l1, *X, -2.5, w, _lasso_by_hand),
        "weighted lasso": Nonsmooth(squares, squares, _l1, *X, weights, w, _lasso_by_hand),
        "elastic net": Nonsmooth(squares, squares, _elastic, *X, elastic, w, _elastic_by_hand),
        "sparse logistic": Nonsmooth(
            *logs, *cancer(), -3.0, np.zeros(30), _sparse_logistic_by_hand
        ),
        "group lasso": Nonsmooth(squares, squares, _group, *X, groups, w),
        "svm dual": _svm(),
        "svr dual": _svr(),
        "simplex": _simplex_qp(),
    }


NONSMOOTH = _table()
