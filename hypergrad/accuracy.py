"""Tolerances that follow the error of the hypergradient they lead to."""

from typing import NamedTuple

import jax.numpy as jnp

from solvers import tree
from solvers.fields import Number, cast
from solvers.types import Scalar, Tree

FIRST_TOL, FIRST_RTOL = 1e-2, 1e-1
LARGEST_RTOL = 0.1


class Accuracy(NamedTuple):
    """Tolerances of the next solves; both of shape ()."""

    tol: Scalar
    """Of the inner solve, absolute."""
    rtol: Scalar
    """Of the adjoint solve, relative."""


def first(w: Tree) -> Accuracy:
    dtype = tree.accumulation_dtype(w)
    return Accuracy(jnp.asarray(FIRST_TOL, dtype), jnp.asarray(FIRST_RTOL, dtype))


def following(at: Accuracy, error: Scalar, residual: Scalar, target: Number) -> Accuracy:
    """Both times `target / error`, within 0.1 and 4; a tenth where the error is unknown (NaN).

    The inner one no more than 100 times the residual that was reached: a tolerance far above it does not bind, and
    would let a later solve do nothing. Neither below what the precision allows.
    """
    eps = float(jnp.finfo(at.tol.dtype).eps)
    error, residual = error.astype(at.tol.dtype), residual.astype(at.tol.dtype)
    tiny = jnp.finfo(error.dtype).tiny
    factor = jnp.clip(cast(target, error) / jnp.maximum(error, tiny), 0.1, 4.0)
    factor = jnp.where(jnp.isfinite(error), factor, 0.1)
    loosest = jnp.maximum(100 * residual, 100 * eps)
    return Accuracy(
        tol=jnp.maximum(jnp.minimum(at.tol * factor, loosest), 100 * eps),
        rtol=jnp.clip(at.rtol * factor, 10 * eps, LARGEST_RTOL),
    )
