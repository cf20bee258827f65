"""Limited-memory BFGS with a memory that survives from one solve to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers import tree
from solvers.base import AbstractInnerSolver
from solvers.fields import Number, number, static
from solvers.line_search import wolfe_search
from solvers.types import ObjectiveFn, Scalar, Tree


class LBFGS(AbstractInnerSolver):
    """Two-loop recursion over the last `memory` pairs, with a weak Wolfe line search.

    `restart` keeps the pairs: the Hessian of the next inner problem is close to that of the last. Pairs
    without positive curvature are skipped, a direction that does not descend is replaced by the
    gradient, and a line search that fails twice ends the solve. One value and gradient per step as a
    rule. Cannot be unrolled in reverse mode (its line search is a loop of unknown length).

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.5.
    """

    max_steps: int = static(100, low=1)
    tol: Number | None = number(None, low=0.0, infinite=False)
    memory: int = static(10, low=1)

    unrollable = False
    minibatches = False

    def init(self, objective: ObjectiveFn, w: Tree, batch: Any) -> "_State":
        vector, _ = tree.flatten(w)
        pairs = jnp.zeros((self.memory, vector.size), vector.dtype)
        empty = jnp.zeros(self.memory, vector.dtype)
        return self._evaluate(objective, w, batch, pairs, pairs, empty)

    def restart(self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any) -> "_State":
        # A failed solve may have left pairs that are not numbers.
        usable = jnp.all(jnp.isfinite(state.inverse_curvature)) & jnp.all(jnp.isfinite(state.steps))
        keep = jnp.where(usable, state.inverse_curvature, jnp.zeros_like(state.inverse_curvature))
        steps, changes = tree.where(
            usable, (state.steps, state.changes), tree.zeros_like((state.steps, state.changes))
        )
        return self._evaluate(objective, w, batch, steps, changes, keep)

    def _evaluate(self, objective, w, batch, steps, changes, inverse_curvature) -> "_State":
        value, gradient = jax.value_and_grad(objective)(w, batch)
        gradient, _ = tree.flatten(gradient)
        return _State(
            value=value.astype(gradient.dtype),
            gradient=gradient,
            steps=steps,
            changes=changes,
            inverse_curvature=inverse_curvature,
            residual=jnp.linalg.norm(gradient),
            failures=jnp.int32(0),
            stalled=jnp.asarray(False),
        )

    def step(
        self, objective: ObjectiveFn, w: Tree, state: "_State", batch: Any
    ) -> tuple[Tree, "_State"]:
        vector, unflatten = tree.flatten(w)

        def value_and_grad(v: Array) -> tuple[Scalar, Array]:
            value, gradient = jax.value_and_grad(objective)(unflatten(v), batch)
            return value.astype(v.dtype), tree.flatten(gradient)[0]

        gradient = state.gradient
        direction = -_two_loop(state, gradient)
        empty = state.inverse_curvature[-1] == 0
        bad = ~(jnp.vdot(gradient, direction) < 0) | empty
        direction = jnp.where(bad, -gradient, direction)
        one = jnp.ones_like(state.value)
        first_step = jnp.where(bad, jnp.minimum(one, 1 / state.residual), one)
        found = wolfe_search(value_and_grad, vector, state.value, gradient, direction, first_step)

        step = found.step * direction
        change = found.gradient - gradient
        curvature = jnp.vdot(step, change)
        eps = jnp.finfo(vector.dtype).eps
        useful = curvature > eps * jnp.linalg.norm(step) * jnp.linalg.norm(change)
        # Newest pair last; after a failure the memory is dropped and the gradient tried once.
        keep = jnp.where(found.failed, 0.0, 1.0).astype(vector.dtype)

        def push(rows: Array, row: Array) -> Array:
            return jnp.where(useful, jnp.concatenate([rows[1:], row[None]]), keep * rows)

        inverse = 1 / jnp.where(useful, curvature, one)
        failures = jnp.where(found.failed, state.failures + 1, jnp.int32(0))
        new = _State(
            value=found.value,
            gradient=found.gradient,
            steps=push(state.steps, step),
            changes=push(state.changes, change),
            inverse_curvature=push(state.inverse_curvature, inverse),
            residual=jnp.linalg.norm(found.gradient),
            failures=failures,
            stalled=failures >= jnp.where(bad, 1, 2),
        )
        return unflatten(vector + step), new


class _State(NamedTuple):
    value: Scalar
    gradient: Array  # (d,)
    steps: Array  # (memory, d): differences of iterates, newest last
    changes: Array  # (memory, d): differences of gradients
    inverse_curvature: Array  # (memory,): 1 / (step . change); 0 marks an unused row
    residual: Scalar
    failures: Array
    stalled: Array


def _two_loop(state: _State, gradient: Array) -> Array:
    """The inverse Hessian approximation times the gradient. Unused rows are zero and do nothing."""

    def backward(q, pair):
        step, change, inverse = pair
        a = inverse * jnp.vdot(step, q)
        return q - a * change, a

    pairs = (state.steps, state.changes, state.inverse_curvature)
    q, coefficients = jax.lax.scan(backward, gradient, pairs, reverse=True)
    change, inverse = state.changes[-1], state.inverse_curvature[-1]
    length2 = jnp.vdot(change, change)
    used = (inverse > 0) & (length2 > 0)
    scale = jnp.where(used, 1 / jnp.where(used, inverse * length2, 1.0), 1.0)

    def forward(r, item):
        (step, change, inverse), a = item
        b = inverse * jnp.vdot(change, r)
        return r + step * (a - b), None

    r, _ = jax.lax.scan(forward, scale * q, (pairs, coefficients))
    return r
