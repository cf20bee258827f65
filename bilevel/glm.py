"""Ready problems for generalised linear models with l2 penalties: tune them on held-out rows.

    problem = bl.glm.softmax(X, y, X_val, y_val)
    h = bl.hypergradient(problem, penalties, jnp.zeros((classes, d)))

`inner` is the mean loss over the training rows plus `0.5 sum(lam w^2)`, `outer` the mean loss over the
validation rows. `w` is (d,), or (classes, d) for softmax, as scikit-learn's `coef_`. `lam` is on the natural
scale and anything that broadcasts against `w`: one number, (d,) for one penalty per feature, or the shape of
`w`. There is no separate intercept: give `X` a column of ones, which is then penalised too.

Each problem carries its Hessian-vector product (two matrix products), a preconditioner (the inverse of the
Hessian's blocks, one per class) and its constants, so that a hypergradient comes with a certified bound.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.problem import Problem
from hypergrad.certificate import Constants


class Batch(NamedTuple):
    """Rows of one level."""

    X: Array
    """(n, d)."""
    y: Array
    """(n,)."""


def ridge(X: Any, y: Any, X_val: Any, y_val: Any) -> Problem:
    """Linear regression: half squared errors. Raises ValueError for shapes that do not fit."""
    return _problem("ridge", X, y, X_val, y_val)


def logistic(X: Any, y: Any, X_val: Any, y_val: Any) -> Problem:
    """Two classes, labels 0 and 1. Raises ValueError for shapes that do not fit, or other labels."""
    return _problem("logistic", X, y, X_val, y_val)


def softmax(X: Any, y: Any, X_val: Any, y_val: Any) -> Problem:
    """Class indices from 0. Raises ValueError for shapes that do not fit, or labels that are none."""
    return _problem("softmax", X, y, X_val, y_val)


def _problem(kind: str, X: Any, y: Any, X_val: Any, y_val: Any) -> Problem:
    train, validation = _rows("", kind, X, y), _rows("_val", kind, X_val, y_val)
    if train.X.shape[1] != validation.X.shape[1]:
        raise ValueError(
            f"X and X_val must have the same features, got shapes {train.X.shape} and {validation.X.shape}."
        )
    model = _MODELS[kind]
    return Problem(
        model.inner,
        model.outer,
        train,
        validation,
        inner_hvp=model.hvp,
        inner_preconditioner=model.preconditioner,
        constants=model.constants,
    )


def _rows(suffix: str, kind: str, X: Any, y: Any) -> Batch:
    X, y = np.asarray(X), np.asarray(y)
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ValueError(
            f"X{suffix} must be (n, d) and y{suffix} (n,), got shapes {X.shape} and {y.shape}."
        )
    if not np.issubdtype(X.dtype, np.floating):
        X = X.astype(np.result_type(float))
    if kind == "softmax":
        if not np.issubdtype(y.dtype, np.integer) or y.min(initial=0) < 0:
            raise ValueError(f"y{suffix} must be class indices from 0, got {y.dtype}, {y.min()}.")
    else:
        y = y.astype(X.dtype)
        if kind == "logistic" and not np.isin(y, (0, 1)).all():
            raise ValueError(f"y{suffix} must be 0 or 1, got {np.unique(y)[:5]}.")
    return Batch(jnp.asarray(X), jnp.asarray(y))


def _predict(kind: str, w: Array, batch: Batch) -> Array:
    """(n,) or (classes, n): rows last, which is several times faster on CPU."""
    form = "(classes, d)" if kind == "softmax" else "(d,)"
    if w.ndim != form.count(" ") + 1:
        raise ValueError(f"expected w of shape {form}, with d = {batch.X.shape[1]}, got {w.shape}.")
    return jnp.einsum("...d,nd->...n", w, batch.X)


def _like(w: Array, lam: Array) -> Array:
    return jnp.broadcast_to(lam, w.shape)


def _losses(kind: str, f: Array, y: Array) -> Array:
    """(n,)."""
    if kind == "ridge":
        return 0.5 * jnp.square(f - y)
    if kind == "logistic":
        return jax.nn.softplus(f) - y * f
    return jax.nn.logsumexp(f, axis=0) - jnp.take_along_axis(f, y[None], axis=0)[0]


def _curve(kind: str, f: Array, u: Array) -> Array:
    """The rows' Hessians in f, times u."""
    if kind == "ridge":
        return u
    if kind == "logistic":
        p = jax.nn.sigmoid(f)
        return p * (1 - p) * u
    p = jax.nn.softmax(f, axis=0)
    return p * (u - jnp.sum(p * u, axis=0, keepdims=True))


def _outer(kind: str, w: Array, lam: Array, batch: Batch) -> Array:
    return jnp.mean(_losses(kind, _predict(kind, w, batch), batch.y))


def _inner(kind: str, w: Array, lam: Array, batch: Batch) -> Array:
    return _outer(kind, w, lam, batch) + 0.5 * jnp.sum(_like(w, lam) * jnp.square(w))


def _hvp(kind: str, w: Array, lam: Array, batch: Batch, v: Array) -> Array:
    u = _curve(kind, _predict(kind, w, batch), _predict(kind, v, batch))
    return jnp.einsum("...n,nd->...d", u, batch.X) / batch.X.shape[0] + _like(w, lam) * v


MAX_BLOCK = 512
"""Largest number of features for which the preconditioner factors blocks; beyond, their diagonals serve."""


def _preconditioner(kind: str, w: Array, lam: Array, batch: Batch) -> Callable[[Array], Array]:
    """`r -> z`: the Hessian in the eigenbasis U of the rows' mean Hessian, its blocks inverted.

    The Hessian is the mean over rows of `B_i x x_i x_i'`, plus the penalties, with B_i (classes, classes).
    In the basis U that makes the mean of B_i diagonal, what the blocks (d, d) leave out averages to zero
    but for the correlation of B_i with x_i. One class has one block: the inverse is exact.

    Cost: for each class, a product X' D X and a Cholesky factor, then 2 d^2 multiplications in each step.
    Source: as K-FAC (Martens and Grosse 2015), with the row weights of each block kept.
    """
    n, d = batch.X.shape
    f = _predict(kind, w, batch).reshape(-1, n)
    classes = f.shape[0]
    curve = lambda direction: _curve(kind, f, jnp.broadcast_to(direction[:, None], (classes, n)))
    basis = jnp.eye(classes, dtype=w.dtype)
    if classes > 1:
        mean = jnp.mean(jax.vmap(curve)(basis), axis=2)
        _, basis = jnp.linalg.eigh(mean)
    weights = jax.vmap(lambda u: u @ curve(u))(basis.T) / n  # (classes, n)
    penalties = jnp.square(basis.T) @ _like(w, lam).reshape(classes, d)

    def into(r: Array) -> Array:
        return basis.T @ r.reshape(classes, d)

    def back(z: Array) -> Array:
        return (basis @ z).reshape(w.shape)

    if d > MAX_BLOCK:
        diagonal = weights @ jnp.square(batch.X) + penalties
        floor = jnp.finfo(w.dtype).eps * jnp.max(diagonal)
        return lambda r: back(into(r) / jnp.maximum(diagonal, floor))

    def inverse_root(weights: Array, penalties: Array) -> Array:
        block = (batch.X * weights[:, None]).T @ batch.X + jnp.diag(penalties)
        # So that the factor exists in this precision.
        shift = 10 * jnp.finfo(w.dtype).eps * jnp.max(jnp.diagonal(block))
        eye = jnp.eye(d, dtype=w.dtype)
        factor = jnp.linalg.cholesky(block + shift * eye)
        return jax.scipy.linalg.solve_triangular(factor, eye, lower=True)

    roots = jax.lax.map(lambda rows: inverse_root(*rows), (weights, penalties))

    def apply(r: Array) -> Array:
        # A square, so positive semidefinite whatever the rounding.
        half = jnp.einsum("kij,kj->ki", roots, into(r))
        return back(jnp.einsum("kij,ki->kj", roots, half))

    return apply


# Largest second derivative of a row's loss in its predictor, and largest third: half squares; s(1 - s)
# <= 1/4 and |s(1-s)(1-2s)| <= 1/(6 sqrt 3) for the sigmoid s; for softmax the variance and the third central
# moment of a variable with values u_k, |u| = 1, so of range at most sqrt 2.
_SECOND = {"ridge": 1.0, "logistic": 0.25, "softmax": 0.5}
_THIRD = {"ridge": 0.0, "logistic": 1 / (6 * 3**0.5), "softmax": 2**1.5 / (6 * 3**0.5)}


def _constants(kind: str, w: Array, lam: Array, inner: Batch, outer: Batch) -> Constants:
    """C is the diagonal matrix of w, its entries of one penalty side by side."""
    row_norms = jnp.linalg.norm(inner.X, axis=1)
    _, undo = jax.vjp(functools.partial(_like, w), lam)
    return Constants(
        strong_convexity=jnp.min(lam),
        hessian_lipschitz=_THIRD[kind] * jnp.mean(row_norms**3),
        cross_lipschitz=1.0,
        outer_lipschitz=_SECOND[kind] * _largest_eigenvalue(outer.X) / outer.X.shape[0],
        outer_cross_lipschitz=0.0,
        cross_norm=jnp.sqrt(jnp.max(undo(jnp.square(w))[0])),
    )


def _largest_eigenvalue(X: Array) -> Array:
    """Of X'X, or, where that is expensive, the trace."""
    if min(X.shape) > 512:
        return jnp.sum(jnp.square(X))
    return jnp.linalg.eigvalsh(X.T @ X if X.shape[1] <= X.shape[0] else X @ X.T)[-1]


class _Model(NamedTuple):
    """One object for each function, so that equal problems share a compiled program."""

    inner: Any
    outer: Any
    hvp: Any
    preconditioner: Any
    constants: Any


_MODELS = {
    kind: _Model(
        *(functools.partial(f, kind) for f in (_inner, _outer, _hvp, _preconditioner, _constants))
    )
    for kind in _SECOND
}
