"""Fixed-point iteration, plain or with Anderson acceleration."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, number, static
from solvers.types import ObjectiveFn, Scalar, Tree


@dataclasses.dataclass(frozen=True)
class Mapping:
    """An inner problem that is a fixed point, `w = T(w, lam, batch)`, in the place of an inner loss.

    As a loss it is `0.5 ||T(w) - w||^2`, so that solvers and engines that want one have it; `FixedPoint` and
    what differentiates its solution use T itself.
    """

    mapping: Callable[[Tree, Any, Any], Tree]

    def __post_init__(self) -> None:
        if not callable(self.mapping):
            raise TypeError(
                f"Mapping(...) takes a function (w, lam, batch) -> w, got {self.mapping!r}."
            )

    def __call__(self, w: Tree, lam: Any, batch: Any) -> Scalar:
        left = tree.sub(self.mapping(w, lam, batch), w)
        return 0.5 * tree.vdot(left, left)


class FixedPoint(AbstractInnerSolver):
    """`w <- T(w)` for the inner problem `Mapping(T)`; with `memory = m > 0` Anderson's acceleration.

    Anderson: the next point is the combination `sum_i a_i T(w_i)` of the last m images whose residuals
    `f_i = T(w_i) - w_i` combine to the smallest, `min ||sum_i a_i f_i||`, `sum_i a_i = 1`. The memory is dropped
    where a residual is ten times the one before.

    Class: plain, T a contraction (rate its factor); accelerated, T smooth, and as fast as GMRES where it is
    affine. `optimality` is `w - T(w)`: where `||T(u) - T(v)|| <= factor ||u - v||`, the distance from the solution is
    at most the residual over `1 - factor`, and `Constants(strong_convexity=1 - factor, ...)` certifies.

    Cost per step: one evaluation of T; m^2 inner products. Memory: 2 m vectors. Can be unrolled.
    Source: Anderson 1965; Walker and Ni 2011.
    """

    max_steps: int = static(1000, low=1)
    tol: Number | None = number(None, low=0.0, infinite=False)
    memory: int = static(0, low=0)

    lagged = True
    symmetric = False

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        flat, _ = tree.flatten(w)
        # No array without entries: those cannot be mapped over in batches.
        rows = jnp.zeros((self.memory, flat.size), flat.dtype) if self.memory else None
        return _State(rows, rows, jnp.int32(0), jnp.full((), jnp.inf, flat.dtype))

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        before, unflatten = tree.flatten(w)
        image, _ = tree.flatten(apply_mapping(objective, w, batch))
        left = image - before
        residual = jnp.linalg.norm(jax.lax.stop_gradient(left))
        if state.images is None or state.lefts is None:
            return unflatten(image), _State(state.images, state.lefts, state.count, residual)
        near = residual < 10 * state.residual  # False for NaN
        count = jnp.where(near, jnp.minimum(state.count + 1, self.memory), 1)
        images = jnp.concatenate([state.images[1:], image[None]])
        lefts = jnp.concatenate([state.lefts[1:], left[None]])
        return unflatten(_combine(images, lefts, count)), _State(images, lefts, count, residual)

    def optimality(self, objective: ObjectiveFn, w: Tree, batch: Any) -> Tree:
        return tree.sub(w, apply_mapping(objective, w, batch))


def apply_mapping(objective: ObjectiveFn, w: Tree, batch: Any) -> Tree:
    """T(w). Raises TypeError for an objective that is no `Mapping`."""
    mapping = getattr(getattr(objective, "fn", None), "mapping", None)
    if mapping is None:
        raise TypeError(
            "FixedPoint solves w = T(w): expected the problem's inner to be bilevel.Mapping(T), not a loss."
        )
    return mapping(w, getattr(objective, "args", None), batch)


def _combine(images: Array, lefts: Array, count: Array) -> Array:
    """Anderson's point from the last `count` rows."""
    rows = lefts.shape[0]
    used = jnp.arange(rows, dtype=jnp.int32) >= rows - count
    # Rows of unit scale, and unused ones orthogonal to all.
    size = jnp.sqrt(jnp.sum(jnp.square(lefts), axis=1, where=used[:, None]))
    unit = jnp.max(jnp.where(used, size, 0))
    unit = jnp.where(unit > 0, unit, jnp.ones_like(unit))
    kept = jnp.where(used[:, None], lefts / unit, 0)
    gram = kept @ kept.T
    # Nearly equal residuals make it singular; this much of a ridge is within their rounding.
    trace = jnp.trace(gram)
    ridge = 10 * jnp.finfo(gram.dtype).eps * jnp.where(trace > 0, trace, jnp.ones_like(trace))
    gram = gram + jnp.diag(jnp.where(used, ridge, jnp.ones_like(ridge)))
    weights = jnp.linalg.solve(gram, used.astype(gram.dtype))
    total = jnp.sum(weights)
    return (weights / total) @ jnp.where(used[:, None], images, 0)


class _State(NamedTuple):
    images: Array | None  # (memory, d), newest last; None without memory
    lefts: Array | None  # (memory, d), T(w) - w
    count: Array  # rows in use
    residual: Scalar
