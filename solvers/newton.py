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
from solvers.linear.cg import CG
from solvers.types import ObjectiveFn, Scalar, Tree


class Newton(AbstractInnerSolver):
    """`w <- w - t H^-1 g`, the system solved by any linear solver, `t` by a weak Wolfe line search.

    The default system solver is CG to a relative 1e-2, so each step costs as many products as the
    accuracy is worth; where CG meets negative curvature its last iterate (or the gradient) is the
    direction. Few, long steps: the right choice where products are cheap against a line search, as
    for generalised linear models. Cannot be unrolled in reverse mode.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.1.
    """

    max_steps: int = static(50, low=1)
    tol: Number | None = number(None, low=0.0)
    linear_solver: AbstractLinearSolver | None = None

    unrollable = False
    minibatches = False

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        value, gradient = jax.value_and_grad(objective)(w, batch)
        flat, _ = tree.flatten(gradient)
        stalled = jnp.asarray(False)
        return _State(value.astype(flat.dtype), flat, jnp.linalg.norm(flat), stalled)

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        vector, unflatten = tree.flatten(w)

        def value_and_grad(v: Array) -> tuple[Scalar, Array]:
            value, gradient = jax.value_and_grad(objective)(unflatten(v), batch)
            return value.astype(v.dtype), tree.flatten(gradient)[0]

        solver = CG(rtol=1e-2) if self.linear_solver is None else self.linear_solver
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
        new = _State(found.value, found.gradient, jnp.linalg.norm(found.gradient), found.failed)
        return unflatten(vector + found.step * direction), new


class _State(NamedTuple):
    value: Scalar
    gradient: Array  # (d,)
    residual: Scalar
    stalled: Array
