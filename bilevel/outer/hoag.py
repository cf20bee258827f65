"""HOAG: inexact hypergradient descent with tolerances that fall by a schedule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bilevel.outer.base import Evaluation, OuterMethod, floors
from bilevel.schedules import power
from solvers.fields import Number, number
from solvers.types import Scalar


class HOAG(OuterMethod):
    """Gradient steps of length 1/L with an L that adapts, inner and adjoint tolerance `tolerance(step)`.

    With Delta the length of the last step and eps its tolerance, a value below
    `F_last + eps/4 + (5/4) eps_last Delta - L Delta^2` makes L 0.95 times as large, one above
    `F_last + 0.2 |F_last|` doubles L, halves the tolerances and goes back. `tolerance` is a number or a
    function of the step; the default is `0.1 / (step + 1)^2`.

    Source: Pedregosa 2016. Its code takes each accepted step twice and after a rejection stays where the
    bad value was; here it is one step, and back to the last point.
    """

    tolerance: Number | Any = number(power(0.1, 2.0), low=0.0, strict=True)
    first_lipschitz: Number | None = number(None, low=0.0, strict=True)

    corrects = False

    def init(self, u: Array) -> "_State":
        zero = jnp.zeros((), u.dtype)
        return _State(u, zero, jnp.zeros_like(u), zero, zero, jnp.ones_like(zero), jnp.int32(0))

    def _tolerance(self, step: Array) -> Scalar:
        value = self.tolerance(step) if callable(self.tolerance) else self.tolerance
        return jnp.asarray(value)

    def accuracy(self, state: "_State") -> tuple[Scalar, Scalar]:
        low_tol, low_rtol = floors(state.u)
        tol = self._tolerance(state.count).astype(state.u.dtype) * state.factor
        return jnp.maximum(tol, low_tol), jnp.clip(tol, low_rtol, 0.1)

    def point(self, state: "_State") -> Array:
        return state.u

    def update(
        self, at: Evaluation, state: "_State", project: Callable[[Array], Array]
    ) -> tuple[Array, "_State"]:
        eps, _ = self.accuracy(state)
        size = jnp.linalg.norm(at.grad)
        start = state.count == 0
        if self.first_lipschitz is None:
            first = jnp.where(size > 1e-3, size / jnp.sqrt(float(at.u.size)), 1.0)
        else:
            first = jnp.asarray(self.first_lipschitz, size.dtype)
        L = jnp.where(start, first, state.lipschitz)
        moved = jnp.linalg.norm(at.u - state.u)
        fell = at.value <= state.value + eps / 4 + 1.25 * state.eps * moved - L * moved**2
        # 1.2 times the last value, also where that is negative.
        worse = ~start & (at.value >= state.value + 0.2 * jnp.abs(state.value))
        L = jnp.where(worse, 2 * L, jnp.where(~start & fell, 0.95 * L, L))
        u = jnp.where(worse, state.u, at.u)
        grad = jnp.where(worse, state.grad, at.grad)
        value = jnp.where(worse, state.value, at.value)
        factor = jnp.where(worse, state.factor / 2, state.factor)
        new = _State(u, value, grad, L, eps, factor, state.count + 1)
        return u - grad / L, new


class _State(NamedTuple):
    u: Array
    value: Scalar
    grad: Array
    lipschitz: Scalar
    eps: Scalar
    factor: Scalar
    count: Array
