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

        def goes_on(t: Array) -> Array:
            return ~bends(t) & (t < longest)

        far = jax.lax.while_loop(goes_on, lambda t: 2 * t, shortest)

        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            inside = bends(middle)
            return jnp.where(inside, low, middle), jnp.where(inside, middle, high)

        low, _ = jax.lax.fori_loop(0, 8, halve, (far / 2, far))
        low = jnp.where(far > shortest, low, jnp.zeros_like(low))
        # Past a kink at k the map leaves its tangent by the jump of the slope (1, for these) times t - k.
        return jnp.where(bends(far), (1 - _BEND) * low, jnp.full_like(low, jnp.inf))

    return jnp.min(jax.vmap(distance)(jnp.concatenate([forth, -forth])))


def bent(defect: Tree, distance: Scalar, share: float, rounding: Scalar | float = 0.0) -> Array:
    """Whether `defect`, the way a map left its tangent, is more than this share of the distance."""
    return tree.max_abs(defect) > share * distance + rounding
