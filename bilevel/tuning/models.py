"""Linear models with one penalty per feature, fitted on all folds at once.

The inner variable stacks the weights of the K folds, the inner loss is the sum of the folds' penalised
training losses (so each fold has its own minimiser), the outer loss is the mean of their held-out
losses. Features are standardised inside each fold: fold k sees `(x - mean_k) / scale_k`, applied to
the weights, `x @ (coef / scale_k) + (intercept - mean_k @ (coef / scale_k))`, so that all folds share
one copy of the features and one matrix product.

Losses are `(w, theta, batch) -> scalar` with `theta` of shape (p,) the numbers that `batch.rule` makes the
penalties of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Rule(NamedTuple):
    """How `theta` makes the penalties, `log lam_kj = sum_i theta_i design_kij`, and the prior on it.

    The prior, in units of the loss, is
    `weight (theta' precision theta / 2 + min(level' theta + log_rows, 0)^2 / 18)`: Gaussian, and a hinge of
    standard deviation 3 against a common penalty `exp(level' theta)` below one over the number of rows.
    """

    design: Array
    """(K, p, d), or (1, p, d) where it is the same for all folds."""
    level: Array
    """(p,)."""
    precision: Array
    """(p, p)."""
    weight: Array
    """(): 0 is no prior."""
    log_rows: Array
    """()."""


class FoldBatch(NamedTuple):
    """Rows of one part (training or held out) of every fold."""

    X: Array
    """(n, d)."""
    y: Array
    """(K, n) target values in the units of each fold, or class indices."""
    weight: Array
    """(K, n): 1 / size of the fold's part for its rows, 0 elsewhere."""
    shift: Array
    """(K, d): mean_k."""
    ratio: Array
    """(K, d): 1 / scale_k."""
    rule: Rule


def init_weights(num_folds: int, num_features: int, num_outputs: int) -> dict[str, Array]:
    """Zero weights of K folds."""
    return {
        "coef": jnp.zeros((num_folds, num_features, num_outputs)),
        "intercept": jnp.zeros((num_folds, num_outputs)),
    }


def penalties(theta: Array, rule: Rule) -> Array:
    """Penalty of every feature in every fold, (K, d) or (1, d)."""
    return jnp.exp(jnp.einsum("p,kpd->kd", theta, rule.design))


def coefficients(w: dict[str, Array], penalties: Array) -> Array:
    """Coefficients of standardised features, (K, d, C).

    The solvers move `coef sqrt(1 + penalty)`: near-unit curvature along each feature, whatever its
    penalty (Jacobi preconditioning).
    """
    return w["coef"] / jnp.sqrt(1 + penalties)[:, :, None]


def predict(coef: Array, intercept: Array, batch: FoldBatch) -> Array:
    """Linear predictor of every fold at every row, (K, C, n): rows last, which is twice as fast."""
    coef = coef * batch.ratio[:, :, None]
    offset = intercept - jnp.einsum("kd,kdc->kc", batch.shift, coef)
    return jnp.einsum("kdc,nd->kcn", coef, batch.X) + offset[:, :, None]


def prior(theta: Array, rule: Rule) -> Array:
    """See `Rule`."""
    hinge = jnp.minimum(rule.level @ theta + rule.log_rows, 0.0)
    return rule.weight * (0.5 * theta @ rule.precision @ theta + jnp.square(hinge) / 18)


def squared_rows(f: Array, y: Array) -> Array:
    """Half squared error of each fold at each row, (K, n)."""
    return 0.5 * jnp.square(f[:, 0] - y)


def logistic_rows(f: Array, y: Array) -> Array:
    """Logistic loss; `y` is 0 or 1."""
    return jax.nn.softplus(f[:, 0]) - y * f[:, 0]


def softmax_rows(f: Array, y: Array) -> Array:
    """Softmax cross-entropy; `y`, (K, n) or (n,), is the class index."""
    picked = jnp.take_along_axis(f, jnp.atleast_2d(y)[:, None, :], axis=1)[:, 0]
    return jax.nn.logsumexp(f, axis=1) - picked


def pin_shift(intercept: Array) -> Array:
    """Chooses, among the equal minimisers of a softmax fit, the intercepts that sum to zero.

    A shift of all intercepts changes no probability, so this costs the fit nothing and makes the
    Hessian positive definite.
    """
    return 0.5 * jnp.sum(jnp.square(jnp.sum(intercept, axis=-1))) / intercept.shape[-1]


def _training_loss(rows: Any, w: dict[str, Array], theta: Array, batch: FoldBatch) -> Array:
    lam = penalties(theta, batch.rule)
    coef = coefficients(w, lam)
    fit = jnp.sum(batch.weight * rows(predict(coef, w["intercept"], batch), batch.y))
    return fit + 0.5 * jnp.sum(lam[:, :, None] * jnp.square(coef))


def _held_out_loss(rows: Any, w: dict[str, Array], theta: Array, batch: FoldBatch) -> Array:
    coef = coefficients(w, penalties(theta, batch.rule))
    losses = batch.weight * rows(predict(coef, w["intercept"], batch), batch.y)
    return jnp.sum(losses) / batch.weight.shape[0] + prior(theta, batch.rule)


# One module-level function for each loss: a fresh closure would be traced and compiled anew.


def ridge_inner(w: Any, theta: Array, batch: FoldBatch) -> Array:
    """Half mean squared error and penalty, summed over folds."""
    return _training_loss(squared_rows, w, theta, batch)


def ridge_outer(w: Any, theta: Array, batch: FoldBatch) -> Array:
    """Mean held-out half squared error, and the prior."""
    return _held_out_loss(squared_rows, w, theta, batch)


def logistic_inner(w: Any, theta: Array, batch: FoldBatch) -> Array:
    """Mean logistic loss and penalty, summed over folds."""
    return _training_loss(logistic_rows, w, theta, batch)


def logistic_outer(w: Any, theta: Array, batch: FoldBatch) -> Array:
    """Mean held-out logistic loss, and the prior."""
    return _held_out_loss(logistic_rows, w, theta, batch)


def softmax_inner(w: Any, theta: Array, batch: FoldBatch) -> Array:
    """Mean cross-entropy and penalty, summed over folds."""
    return _training_loss(softmax_rows, w, theta, batch) + pin_shift(w["intercept"])


def softmax_outer(w: Any, theta: Array, batch: FoldBatch) -> Array:
    """Mean held-out cross-entropy, and the prior."""
    return _held_out_loss(softmax_rows, w, theta, batch)


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
