"""Optimality maps: `(w, *args) -> residual` like `w`, zero at the solution. For `bilevel.implicit`.

    stationary          dg/dw
    fixed_point         w - T(w)
    proximal            w - prox(w - s dg/dw)           also a projection, or a tuple of them, one for each block
    exponentiated       w - w exp(-s dg/dw) / sum       a probability vector (mirror descent with the entropy)
    kkt                 (dL/dw, h, mu G), L = g + nu h + mu G      equality h = 0, inequality G <= 0

A loss is `(w, *args) -> scalar`. None of the derivatives at a solution depends on the step s. At a kink
(a weight at zero whose gradient is as large as its penalty; an active constraint with a multiplier of
zero) there is no derivative; JAX takes that of one side.

Source: Blondel et al. 2022, table 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.types import Tree

Map = Callable[..., Tree]
Loss = Callable[..., Array]


def stationary(loss: Loss) -> Map:
    """`dg/dw`: an unconstrained minimum. Its Jacobian is symmetric."""
    return jax.grad(loss)


def fixed_point(mapping: Map) -> Map:
    """`w - T(w, *args)`."""
    return lambda w, *args: tree.sub(w, mapping(w, *args))


def proximal(
    loss: Loss,
    prox: Callable[..., Tree] | tuple[Callable[..., Tree], ...],
    step: float | tuple[float, ...] = 1.0,
) -> Map:
    """`w - prox(w - s dg/dw, s, *args)`: a smooth loss plus what the prox belongs to, or a projection.

    `prox` is `(v, s, *args) -> w` (see `bilevel.prox`). With a tuple of proxes `w` is a tuple of as many
    blocks, each with its own prox, and its own step where `step` is a tuple too. Raises ValueError where
    their numbers differ.
    """
    one = not isinstance(prox, tuple)
    proxes = prox if isinstance(prox, tuple) else (prox,)
    steps = step if isinstance(step, tuple) else (step,) * len(proxes)
    if len(steps) != len(proxes):
        raise ValueError(f"proximal got {len(proxes)} proxes and {len(steps)} steps.")

    def residual(w: Tree, *args: Any) -> Tree:
        gradient = jax.grad(loss)(w, *args)
        blocks, gradients = ((w,), (gradient,)) if one else (w, gradient)
        if len(blocks) != len(proxes):
            raise ValueError(f"proximal got {len(proxes)} proxes for {len(blocks)} blocks of w.")
        left = tuple(
            tree.sub(x, prox(tree.axpy(-size, g, x), size, *args))
            for x, g, prox, size in zip(blocks, gradients, proxes, steps, strict=True)
        )
        return left[0] if one else left

    return residual


def exponentiated(loss: Loss, step: float = 1.0) -> Map:
    """`w - w exp(-s dg/dw) / sum(...)`: a minimum over probability vectors `w` (..., n), last axis.

    As `softmax(log w - s dg/dw)`, but without the logarithm of weights that are zero.
    """

    def residual(w: Array, *args: Any) -> Array:
        gradient = jax.grad(loss)(w, *args)
        shift = jax.lax.stop_gradient(jnp.min(gradient, axis=-1, keepdims=True))
        raised = w * jnp.exp(-step * (gradient - shift))
        return w - raised / jnp.sum(raised, axis=-1, keepdims=True)

    return residual


class KKT(NamedTuple):
    """A constrained minimum: the solution `kkt` is about."""

    w: Tree
    nu: Array | None = None
    """Multipliers of the equalities, any sign; None where there are none."""
    mu: Array | None = None
    """Multipliers of the inequalities, zero or positive; None where there are none."""


def kkt(loss: Loss, equality: Map | None = None, inequality: Map | None = None) -> Map:
    """`(dL/dw, h(w), mu G(w))`, `L = g + <nu, h> + <mu, G>`, for `h(w, *args) = 0` and `G(w, *args) <= 0`.

    The solution is a `KKT(w, nu, mu)`. Its Jacobian is not symmetric; it is invertible where the active
    constraints' gradients are independent, the Hessian of L is positive definite along them, and each
    inequality has either slack or a positive multiplier. `mu G = 0` does not see a violated constraint
    with multiplier zero, nor a negative multiplier: both make the residual NaN.
    """

    def residual(solution: KKT, *args: Any) -> KKT:
        w, nu, mu = solution
        h = None if equality is None else equality(w, *args)

        def lagrangian(w: Tree) -> Array:
            value = loss(w, *args)
            for weights, constraint in ((nu, equality), (mu, inequality)):
                if constraint is not None:
                    value += jnp.sum(weights * constraint(w, *args))
            return value

        product = None
        if inequality is not None and mu is not None:
            bound = inequality(w, *args)
            slack = jnp.sqrt(jnp.finfo(bound.dtype).eps)
            feasible = (bound <= slack * (1 + jnp.abs(mu))) & (mu >= -slack)
            product = jnp.where(feasible, mu * bound, jnp.nan)
        return KKT(jax.grad(lagrangian)(w), h, product)

    return residual
