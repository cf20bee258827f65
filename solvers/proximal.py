"""Proximal gradient descent."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, cast, number, static
from solvers.gradient import linearized_hvp
from solvers.linear.spectrum import largest_eigenvalue
from solvers.types import ObjectiveFn, Scalar, Tree


def apply_prox(objective: ObjectiveFn, v: Tree, step: Scalar) -> Tree:
    """The prox of `step` times the objective's nonsmooth part; the identity where it has none."""
    prox = getattr(objective, "prox", None)
    return v if prox is None else prox(v, step, getattr(objective, "args", None))


def safe_step(objective: ObjectiveFn, w: Tree, batch: Any) -> Scalar:
    """`1 / (1.05 L)`, L the largest curvature of the smooth part at `w` by 12 Lanczos products.

    No derivative is taken through it; 1 where there is no curvature.
    """
    _, hvp = linearized_hvp(objective, w, batch)
    curvature = jax.lax.stop_gradient(largest_eigenvalue(hvp, w, jax.random.key(0)))
    return jnp.where(curvature > 0, 1 / (1.05 * curvature), jnp.ones_like(curvature))


class ProximalGradient(AbstractInnerSolver):
    """`w <- prox(y - s grad g(y))` for `g(w) + psi(w)`, `y` extrapolated from the last two `w` (FISTA).

    g is the objective as called, psi what its `prox` belongs to (an objective without one is smooth, and
    `SolveInfo.value` is g alone). Momentum starts afresh where it points away from the last step
    (`<y - w+, w+ - w> > 0`), so that strong convexity gives a linear rate without being known.
    `accelerate=False` is plain proximal gradient descent.

    `learning_rate="auto"` is `1 / (1.05 L)`, L by 12 Lanczos products at the start. Any step is shortened
    where two successive gradients show a larger curvature than it allows for. `optimality` is the prox
    residual `(w - prox(w - s grad g(w))) / s`, on the scale of a gradient and equal to it where psi = 0.

    Cost per step: one gradient, one prox. Can be unrolled in reverse mode.
    Source: Beck and Teboulle 2009; restart by O'Donoghue and Candes 2015 (gradient scheme). The
    safeguard on the step is a secant test in place of their line search, which reverse mode cannot pass.
    """

    max_steps: int = static(1000, low=1)
    tol: Number | None = number(None, low=0.0, infinite=False)
    learning_rate: Number | str = number("auto", low=0.0, strict=True)
    accelerate: bool = static(True)

    measured = ("learning_rate",)
    proximal = True

    def __check_init__(self) -> None:
        if isinstance(self.learning_rate, str) and self.learning_rate != "auto":
            raise ValueError(
                "ProximalGradient(learning_rate=...) must be a positive number or 'auto', got "
                f"{self.learning_rate!r}."
            )

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        step = self._step(objective, w, batch)
        one = jnp.ones_like(step)
        zeros = tree.zeros_like(w)
        # The gradient "before" the first belongs to no point: the secant test skips a zero distance.
        fixed = eqx.tree_at(lambda solver: solver.learning_rate, self, step)
        residual = tree.norm(jax.lax.stop_gradient(fixed.optimality(objective, w, batch)))
        return _State(w, w, zeros, one, step, residual)

    def _step(self, objective: ObjectiveFn, w: Tree, batch: Any) -> Scalar:
        if isinstance(self.learning_rate, str):
            return safe_step(objective, w, batch)
        return cast(self.learning_rate, jnp.zeros((), tree.accumulation_dtype(w)))

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        y = state.point
        gradient = jax.grad(objective)(y, batch)
        step, too_long = self._shortened(y, gradient, state)
        new = apply_prox(objective, tree.axpy(-step, gradient, y), step)
        # T = prox(I - s grad g) is nonexpansive for these steps, so the residual at `new` = T(y) is at
        # most that at y, which is ||y - T(y)|| / s: known without another gradient.
        back = jax.lax.stop_gradient(tree.sub(y, new))
        move = tree.sub(new, w)
        length2, along = tree.vdots((back, back), (back, jax.lax.stop_gradient(move)))
        residual = 1.01 * jnp.sqrt(length2) / jax.lax.stop_gradient(step)
        if not self.accelerate:
            return new, _State(new, y, gradient, state.momentum, step, residual)
        turned = (along > 0) | too_long
        one = jnp.ones_like(state.momentum)
        following = (1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2
        factor = jnp.where(turned, 0 * one, (state.momentum - 1) / following)
        point = tree.axpy(factor, move, new)
        momentum = jnp.where(turned, one, following)
        return new, _State(point, y, gradient, momentum, step, residual)

    def _shortened(self, y: Tree, gradient: Tree, state: "_State") -> tuple[Scalar, Any]:
        """The step, cut where `||g(y) - g(y')|| / ||y - y'||` at the last two points is too large for it."""
        y, gradient, last = jax.lax.stop_gradient((y, gradient, state))
        dtype = state.step.dtype
        differences = tree.sub((y, gradient), (last.point_before, last.gradient))
        distance, rise, length = tree.norms(*differences, y).astype(dtype)
        # Below this distance the difference of two gradients is rounding error.
        known = distance > 1e3 * tree.epsilon(y) ** 0.5 * length
        curvature = jnp.where(known, rise / jnp.where(known, distance, 1), jnp.zeros((), dtype))
        limit = 1.1 if self.accelerate else 1.9
        too_long = curvature * last.step > limit
        shorter = 1 / (1.05 * jnp.where(too_long, curvature, jnp.ones((), dtype)))
        return jnp.where(too_long, shorter, state.step), too_long

    def settled(self, state: "_State") -> "ProximalGradient":
        return eqx.tree_at(lambda solver: solver.learning_rate, self, state.step)

    def optimality(self, objective: ObjectiveFn, w: Tree, batch: Any) -> Tree:
        step = self._step(objective, w, batch)
        gradient = jax.grad(objective)(w, batch)
        mapped = apply_prox(objective, tree.axpy(-step, gradient, w), step)
        return tree.divide(tree.sub(w, mapped), step)


class _State(NamedTuple):
    point: Tree  # where the next gradient is taken
    point_before: Tree  # where the last one was
    gradient: Tree  # the last one
    momentum: Scalar  # t of FISTA
    step: Scalar
    residual: Scalar
