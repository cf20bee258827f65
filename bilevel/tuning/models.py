"""Linear models with one penalty, fitted on all folds at once.

The inner variable stacks the weights of the K folds, the inner loss is the sum of the folds' penalised
training losses (so each fold has its own minimiser), the outer loss is the mean of their held-out
losses. Features are standardised inside each fold: fold k sees `(x - mean_k) / scale_k`, applied to
the weights, `x @ (coef / scale_k) + (intercept - mean_k @ (coef / scale_k))`, so that all folds share
one copy of the features and one matrix product.

Losses are `(w, lam, batch) -> scalar` with `lam` the penalty of shape ().
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class FoldBatch(NamedTuple):
    """Rows of one part (training or held out) of every fold."""

    X: Array
    """(n, d)."""
    y: Array
    """(n,) target values, or class indices."""
    weight: Array
    """(K, n): 1 / size of the fold's part for its rows, 0 elsewhere."""
    shift: Array
    """(K, d): mean_k."""
    ratio: Array
    """(K, d): 1 / scale_k."""


def init_weights(num_folds: int, num_features: int, num_outputs: int) -> dict[str, Array]:
    """Zero weights of K folds."""
    return {
        "coef": jnp.zeros((num_folds, num_features, num_outputs)),
        "intercept": jnp.zeros((num_folds, num_outputs)),
    }


def predict(w: dict[str, Array], batch: FoldBatch) -> Array:
    """Linear predictor of every fold at every row, (K, C, n): rows last, which is twice as fast."""
    coef = w["coef"] * batch.ratio[:, :, None]
    offset = w["intercept"] - jnp.einsum("kd,kdc->kc", batch.shift, coef)
    return jnp.einsum("kdc,nd->kcn", coef, batch.X) + offset[:, :, None]


def squared_rows(f: Array, y: Array) -> Array:
    """Half squared error of each fold at each row, (K, n)."""
    return 0.5 * jnp.square(f[:, 0] - y[None, :])


def logistic_rows(f: Array, y: Array) -> Array:
    """Logistic loss; `y` is 0 or 1."""
    return jax.nn.softplus(f[:, 0]) - y[None, :] * f[:, 0]


def softmax_rows(f: Array, y: Array) -> Array:
    """Softmax cross-entropy; `y` is the class index."""
    picked = jnp.take_along_axis(f, y[None, None, :], axis=1)[:, 0]
    return jax.nn.logsumexp(f, axis=1) - picked


def pin_shift(intercept: Array) -> Array:
    """Chooses, among the equal minimisers of a softmax fit, the intercepts that sum to zero.

    A shift of all intercepts changes no probability, so this costs the fit nothing and makes the
    Hessian positive definite.
    """
    return 0.5 * jnp.sum(jnp.square(jnp.sum(intercept, axis=-1))) / intercept.shape[-1]


def _training_loss(rows: Any, w: dict[str, Array], lam: Array, batch: FoldBatch) -> Array:
    fit = jnp.sum(batch.weight * rows(predict(w, batch), batch.y))
    return fit + 0.5 * lam * jnp.sum(jnp.square(w["coef"]))


def _held_out_loss(rows: Any, w: dict[str, Array], batch: FoldBatch) -> Array:
    return jnp.sum(batch.weight * rows(predict(w, batch), batch.y)) / batch.weight.shape[0]


# One module-level function for each loss: a fresh closure would be traced and compiled anew.


def ridge_inner(w: Any, lam: Array, batch: FoldBatch) -> Array:
    """Half mean squared error and penalty, summed over folds."""
    return _training_loss(squared_rows, w, lam, batch)


def ridge_outer(w: Any, lam: Array, batch: FoldBatch) -> Array:
    """Mean held-out half squared error."""
    return _held_out_loss(squared_rows, w, batch)


def logistic_inner(w: Any, lam: Array, batch: FoldBatch) -> Array:
    """Mean logistic loss and penalty, summed over folds."""
    return _training_loss(logistic_rows, w, lam, batch)


def logistic_outer(w: Any, lam: Array, batch: FoldBatch) -> Array:
    """Mean held-out logistic loss."""
    return _held_out_loss(logistic_rows, w, batch)


def softmax_inner(w: Any, lam: Array, batch: FoldBatch) -> Array:
    """Mean cross-entropy and penalty, summed over folds."""
    return _training_loss(softmax_rows, w, lam, batch) + pin_shift(w["intercept"])


def softmax_outer(w: Any, lam: Array, batch: FoldBatch) -> Array:
    """Mean held-out cross-entropy."""
    return _held_out_loss(softmax_rows, w, batch)


class Model(NamedTuple):
    """Losses of one model."""

    inner: Any
    outer: Any
    rows: Any


MODELS = {
    "ridge": Model(ridge_inner, ridge_outer, squared_rows),
    "logistic": Model(logistic_inner, logistic_outer, logistic_rows),
    "softmax": Model(softmax_inner, softmax_outer, softmax_rows),
}
