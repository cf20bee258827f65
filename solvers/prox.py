"""Proximal operators on pytrees: `prox(v) = argmin_w step psi(w) + ||w - v||^2 / 2`.

They are plain functions, differentiable in the variable and in the penalties; a problem takes one as
`inner_prox(v, step, lam)`. A penalty is one number, or a tree like `v` of numbers and arrays that
broadcast against its leaves: one for each coordinate. A projection is the prox of an indicator and has
no step. NaN in, NaN out; and NaN where there is no such point, or no one such point: at a penalty below zero, a
box or a simplex without points.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from solvers.types import Tree

Penalty = Any
"""A number, or a tree like the variable of numbers and arrays."""


def l1(v: Tree, step: Array | float, penalty: Penalty) -> Tree:
    """Soft threshold, the prox of `sum_j penalty_j |w_j|`: `sign(v) max(|v| - step penalty, 0)`."""
    return _leafwise(lambda x, a: _soft(x, _like(step, x) * a), v, penalty)


def elastic_net(v: Tree, step: Array | float, penalty: Penalty, ridge: Penalty) -> Tree:
    """The prox of `sum_j penalty_j |w_j| + ridge_j w_j^2 / 2`: `soft(v, step penalty) / (1 + step ridge)`."""
    return _leafwise(lambda x, b: x / _or_nan(1 + _like(step, x) * b), l1(v, step, penalty), ridge)


def group_lasso(
    v: Tree, step: Array | float, penalty: Penalty, groups: np.ndarray | None = None
) -> Tree:
    """The prox of `sum_g penalty_g ||w_g||`: `max(1 - step penalty_g / ||v_g||, 0) v_g`.

    Without `groups` each leaf is a group, and `penalty` a number or a tree of numbers. Else `v` is one
    array, `groups` holds the number of each entry's group, 0, 1, ..., as concrete integers of the shape
    of `v`, and `penalty` is a number or one for each group.
    """
    if groups is None:
        return _leafwise(lambda x, a: _shrink(x, jnp.sum(x * x), _like(step, x) * a), v, penalty)
    groups = np.asarray(groups)
    if not np.issubdtype(groups.dtype, np.integer) or groups.shape != jnp.shape(v):
        raise ValueError(
            f"groups must be integers of the shape of v, {jnp.shape(v)}, got {groups.dtype} of "
            f"shape {groups.shape}."
        )
    labels = groups.ravel()
    count = int(labels.max()) + 1
    if labels.min() < 0 or jnp.ndim(penalty) and jnp.shape(penalty) != (count,):
        raise ValueError(
            f"groups must be numbered from 0 and penalty be a number or {count} of them, one for each "
            f"group, got labels from {labels.min()} and shape {jnp.shape(penalty)}."
        )
    flat = v.ravel()
    squares = jax.ops.segment_sum(flat * flat, labels, num_segments=count)
    threshold = jnp.broadcast_to(_like(step, flat) * _like(penalty, flat), (count,))
    return _shrink(flat, squares[labels], threshold[labels]).reshape(v.shape)


def sparse_group_lasso(
    v: Tree,
    step: Array | float,
    penalty: Penalty,
    group_penalty: Penalty,
    groups: np.ndarray | None = None,
) -> Tree:
    """The prox of `sum_j penalty_j |w_j| + sum_g group_penalty_g ||w_g||`: `l1`, then `group_lasso`.

    That the two compose is special to this pair of penalties (Simon et al. 2013).
    """
    return group_lasso(l1(v, step, penalty), step, group_penalty, groups)


def box(v: Tree, low: Penalty, high: Penalty) -> Tree:
    """The projection on `low <= w <= high`: `min(max(v, low), high)`; `-inf` and `inf` are no bound."""
    above = _leafwise(lambda x, a: jnp.maximum(x, a), v, low)
    inside = _leafwise(lambda x, b: jnp.minimum(x, b), above, high)
    # An empty box has put its upper bound below the lower one.
    return _leafwise(lambda x, a: jnp.where(x < a, jnp.nan, x), inside, low)


def non_negative(v: Tree) -> Tree:
    """The projection on `w >= 0`: `max(v, 0)`."""
    return jax.tree.map(lambda x: jnp.maximum(x, 0), v)


def simplex(v: Tree, total: Penalty = 1.0) -> Tree:
    """The projection on `w >= 0, sum w = total`, along the last axis of each leaf: `max(v - tau, 0)`.

    `total` is a number, or a tree of one for each row. `tau` comes from a sort (Held, Wolfe and Crowder
    1974); derivatives see the active set alone.
    """

    def project(x: Array, total: Array) -> Array:
        total = jnp.broadcast_to(total, x.shape[:-1])[..., None]
        held = jax.lax.stop_gradient(x)
        ordered = -jnp.sort(-held, axis=-1)
        count = np.arange(1, x.shape[-1] + 1, dtype=x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        excess = jnp.cumsum(ordered, axis=-1) - jax.lax.stop_gradient(total)
        size = jnp.sum(ordered * count > excess, axis=-1, keepdims=True)
        last = jnp.maximum(size - 1, 0)
        tau = jnp.take_along_axis(excess, last, axis=-1) / (last + 1).astype(x.dtype)
        active = held > tau
        number = jnp.maximum(jnp.sum(active, axis=-1, keepdims=True), 1).astype(x.dtype)
        kept = jnp.where(active, x, jnp.zeros_like(x))
        shift = (jnp.sum(kept, axis=-1, keepdims=True) - total) / number
        result = jnp.where(active, x - shift, jnp.zeros_like(x))
        broken = jnp.any(jnp.isnan(held), axis=-1, keepdims=True) | ~(total >= 0)
        return jnp.where(broken, jnp.nan, result)

    return _leafwise(project, v, total)


def _soft(x: Array, threshold: Array) -> Array:
    # Exactly zero below the threshold; a comparison would lose a NaN.
    threshold = _or_nan(threshold)
    return x - jnp.minimum(jnp.maximum(x, -threshold), threshold)


def _shrink(x: Array, square: Array, threshold: Array) -> Array:
    """`x` scaled by `max(1 - threshold / norm, 0)`, with a derivative where the norm is zero."""
    empty, threshold = square == 0, _or_nan(threshold)
    norm = jnp.sqrt(jnp.where(empty, jnp.ones_like(square), square))
    at_zero = jnp.where(threshold > 0, jnp.zeros_like(square), jnp.ones_like(square))
    return x * jnp.where(empty, at_zero, jnp.maximum(1 - threshold / norm, 0))


def _or_nan(number: Array) -> Array:
    """A number that must not be below zero."""
    return jnp.where(number < 0, jnp.nan, number)


def _like(value: Any, x: Array) -> Array:
    return jnp.asarray(value).astype(x.dtype)


def _leafwise(fn: Callable[[Array, Array], Array], v: Tree, setting: Penalty) -> Tree:
    """`fn(leaf, number)` over the leaves of `v`; a lone setting serves all of them."""
    structure = jax.tree.structure(v)
    if jax.tree.structure(setting) == structure:
        return jax.tree.map(lambda x, a: fn(x, _like(a, x)), v, setting)
    if jax.tree.structure(setting) == jax.tree.structure(0) and jnp.ndim(setting) == 0:
        return jax.tree.map(lambda x: fn(x, _like(setting, x)), v)
    raise ValueError(
        f"a penalty must be a number or a tree like the variable, {structure}, "
        f"got {jax.tree.structure(setting)}."
    )
