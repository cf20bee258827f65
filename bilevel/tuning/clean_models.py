"""Losses of label cleaning: softmax regression with one weight per example.

Losses are `(w, lam, batch) -> scalar` with `lam` the weights of the training rows, shape (n,).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bilevel.tuning.models import pin_shift, softmax_rows


class WeightedRows(NamedTuple):
    """Training rows: what does not change while the weights are learned."""

    X: Array
    y: Array
    count: Array
    """What the sum over rows is divided by, shape ()."""
    penalty: Array
    """Shape ()."""


class TrustedRows(NamedTuple):
    """Trusted rows; `weight` sums to 1 over those in use, so folds of them share one program."""

    X: Array
    y: Array
    weight: Array


def init_weights(num_features: int, num_classes: int) -> dict[str, Array]:
    """Zero weights."""
    return {
        "coef": jnp.zeros((num_features, num_classes)),
        "intercept": jnp.zeros(num_classes),
    }


def _cross_entropy(w: Any, X: Array, y: Array) -> Array:
    f = jnp.einsum("dc,nd->cn", w["coef"], X) + w["intercept"][:, None]
    return softmax_rows(f[None], y)[0]


def weighted_inner(w: Any, lam: Array, batch: WeightedRows) -> Array:
    """Weighted mean cross-entropy and penalty: `sum_i lam_i CE_i / count + penalty / 2 ||coef||^2`."""
    fit = jnp.sum(lam * _cross_entropy(w, batch.X, batch.y)) / batch.count
    penalty = 0.5 * batch.penalty * jnp.sum(jnp.square(w["coef"]))
    return fit + penalty + pin_shift(w["intercept"])


def trusted_outer(w: Any, lam: Array, batch: TrustedRows) -> Array:
    """Mean cross-entropy of the trusted rows in use."""
    return jnp.sum(batch.weight * _cross_entropy(w, batch.X, batch.y))
