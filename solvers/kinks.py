"""How far a point is from a kink of a piecewise smooth map, such as a proximal operator."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.types import Scalar, Tree

_BEND = 0.1
"""A map counts as bent where it leaves its tangent by this share of the distance."""


def kink_distance(fn: Callable[[Tree], Tree], v: Tree) -> Scalar:
    """The smallest `t` at which `fn(v + t d)` leaves its tangent at `v`: by a tenth of `t` in some entry.

    Six directions d of entries 1 and -1 are tried: that of the signs of `v`, two with no pattern, and
    their opposites; so the distance is in the largest change of an entry. It is exact to 1 % for the soft
    threshold and for boxes, where each entry has its own kinks and the signs of `v` lead to the
    nearest; for a map that couples entries it is a probe, of the right order of magnitude, and for
    a curved one at most a tenth of the radius of curvature.
    0 where the map bends within rounding of `v`, infinity where no bend lies within a thousand times the
    size of `v`.

    Cost: at most 70 evaluations for each direction (they run side by side).
    """
    flat, unflatten = tree.flatten(v)
    dtype, eps = flat.dtype, tree.epsilon(v)
    signs = jnp.where(flat < 0, -1, 1).astype(dtype)
    places = jnp.arange(flat.size, dtype=dtype)  # a random draw's code is long to compile
    irregular = [jnp.where(jnp.sin(rate * places**2 + rate) < 0, -1, 1) for rate in (1.7, 2.3)]
    forth = jnp.stack([signs, *(direction.astype(dtype) for direction in irregular)])
    size = jnp.max(jnp.abs(flat))
    size = jnp.where(size > 0, size, jnp.ones_like(size))
    shortest, longest = 1024 * eps * size, 1024 * size

    def vector(x: Array) -> Array:
        return tree.flatten(fn(unflatten(x)))[0]

    start, tangent = jax.linearize(vector, flat)

    def distance(direction: Array) -> Array:
        slope = tangent(direction)

        def bends(t: Array) -> Array:
            return bent(vector(flat + t * direction) - start - t * slope, t, _BEND)

        def goes_on(ends: tuple[Array, Array, Array]) -> Array:
            low, high, halvings = ends
            doubles = jnp.isinf(high) & (low < longest)
            return doubles | ((low > 0) & jnp.isfinite(high) & (halvings < 8))

        def narrow(ends: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """Doubling and bisection in one body, as compilation takes as long as the maps that are written out."""
            low, high, halvings = ends
            doubles = jnp.isinf(high)
            t = jnp.where(doubles, jnp.maximum(2 * low, shortest), (low + high) / 2)
            inside = bends(t)
            halvings = jnp.where(doubles, halvings, halvings + 1)
            return jnp.where(inside, low, t), jnp.where(inside, t, high), halvings

        # `low` is where the map still was on its tangent, `high` where it no longer was.
        begin = (jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype), jnp.int32(0))
        low, high, _ = jax.lax.while_loop(goes_on, narrow, begin)
        # Past a kink at k the map leaves its tangent by the jump of the slope (1, for these) times t - k.
        return jnp.where(jnp.isfinite(high), (1 - _BEND) * low, high)

    return jnp.min(jax.vmap(distance)(jnp.concatenate([forth, -forth])))


def bent(defect: Tree, distance: Scalar, share: float, rounding: Scalar | float = 0.0) -> Array:
    """Whether `defect`, the way a map left its tangent, is more than this share of the distance."""
    return tree.max_abs(defect) > share * distance + rounding
