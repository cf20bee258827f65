"""Truncated Newton."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, number, static
from solvers.gradient import linearized_hvp
from solvers.line_search import wolfe_search
from solvers.linear.base import AbstractLinearSolver
from solvers.linear.cg import CG, preconditioned
from solvers.types import ObjectiveFn, Scalar, Tree


class Newton(AbstractInnerSolver):
    """`w <- w - t H^-1 g`, the system solved by any linear solver, `t` by a weak Wolfe line search.

    The default system solver is CG to a relative `min(0.1, sqrt(||g|| / ||g_0||))`, with g_0 the gradient
    at the start: rough steps far from the solution, a superlinear end. Where CG meets negative
    curvature its last iterate (or the gradient) is the direction. Few, long steps: the right choice
    where products are cheap against a line search, as for generalised linear models. Cannot be unrolled
    in reverse mode.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.1; its tolerance depends on the scale
    of the loss, this one does not.
    """

    max_steps: int = static(50, low=1)
    tol: Number | None = number(None, low=0.0, infinite=False)
    linear_solver: AbstractLinearSolver | None = None

    second_order = True
    unrollable = False
    minibatches = False

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        value, gradient = jax.value_and_grad(objective)(w, batch)
        flat, _ = tree.flatten(gradient)
        residual, stalled = jnp.linalg.norm(flat), jnp.asarray(False)
        first = jnp.where(residual > 0, residual, jnp.ones_like(residual))
        return _State(value.astype(flat.dtype), flat, residual, first, stalled)

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        vector, unflatten = tree.flatten(w)

        def value_and_grad(v: Array) -> tuple[Scalar, Array]:
            value, gradient = jax.value_and_grad(objective)(unflatten(v), batch)
            return value.astype(v.dtype), tree.flatten(gradient)[0]

        rtol = jnp.minimum(0.1, jnp.sqrt(state.residual / state.first))
        solver = CG(rtol=rtol) if self.linear_solver is None else self.linear_solver
        solver = preconditioned(solver, objective, w, batch)
        key = jax.random.key(0)
        _, hvp = linearized_hvp(objective, w, batch)
        rhs = unflatten(-state.gradient)
        prepared = solver.init(hvp, w, key)
        direction, _ = solver.solve(hvp, rhs, tree.zeros_like(w), prepared, key)
        direction, _ = tree.flatten(direction)
        descends = jnp.vdot(state.gradient, direction) < 0
        direction = jnp.where(descends, direction, -state.gradient)
        one = jnp.ones_like(state.value)
        first_step = jnp.where(descends, one, jnp.minimum(one, 1 / state.residual))
        found = wolfe_search(
            value_and_grad, vector, state.value, state.gradient, direction, first_step
        )
        residual = jnp.linalg.norm(found.gradient)
        new = _State(found.value, found.gradient, residual, state.first, found.failed)
        return unflatten(vector + found.step * direction), new


class _State(NamedTuple):
    value: Scalar
    gradient: Array  # (d,)
    residual: Scalar
    first: Scalar  # the residual at the start, or 1
    stalled: Array
