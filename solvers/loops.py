"""The loops that run an inner solver's steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from solvers import status, tree
from solvers.base import AbstractInnerSolver
from solvers.fields import cast
from solvers.status import Status
from solvers.types import ObjectiveFn, Sampler, Scalar, SolveInfo, Tree


def tolerance(solver: AbstractInnerSolver, w: Tree) -> Scalar:
    """The absolute tolerance in force: the solver's own, or 1e-8 in float64 and 1e-4 otherwise."""
    like = jnp.zeros((), tree.accumulation_dtype(w))
    default = 1e-8 if tree.epsilon(w) < 1e-10 else 1e-4
    return jnp.asarray(default, like.dtype) if solver.tol is None else cast(solver.tol, like)


def solve(
    solver: AbstractInnerSolver, objective: ObjectiveFn, w: Tree, state: Any, sampler: Sampler
) -> tuple[Tree, Any, SolveInfo]:
    """Run until the tolerance or the budget is reached: `(w, state, info)`.

    With minibatches that change from step to step there is no residual to stop at: the whole budget
    is run. Reverse mode does not go through this loop.
    """
    if sampler.varies and solver.minibatches:
        w, state = run_steps(solver, objective, w, state, sampler, solver.max_steps)
        num_steps, tol = jnp.int32(solver.max_steps), jnp.zeros(())
    else:
        tol = tolerance(solver, w)
        w, state, num_steps = run_until(solver, objective, w, state, sampler(0), stop_level(tol, w))
    return w, state, judge(solver.settled(state), objective, w, sampler(0), num_steps, tol)


def stop_level(tol: Scalar, w: Tree) -> Scalar:
    """Where a loop ends: what `judge` takes for met, as steps below rounding cost much and gain nothing."""
    return jnp.where(tol > 0, jnp.maximum(tol, 10 * tree.epsilon(w)), tol)


def rounding_level(value: Scalar, w: Tree) -> Scalar:
    """`10 eps max(1, |value|)`: a gradient norm below this is rounding error."""
    dtype = tree.accumulation_dtype(w)
    return 10 * tree.epsilon(w) * jnp.maximum(jnp.abs(value).astype(dtype), 1.0)


def judge(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    batch: Any,
    num_steps: Array,
    tol: Scalar,
) -> SolveInfo:
    """Value and recomputed residual at `w`, and the status they deserve.

    A tolerance below the rounding level `10 eps max(1, |value|)` is met there. `tol = 0` asks for a
    fixed budget: what residual is left is OK.
    """
    value = objective(w, batch)
    residual = tree.norm(solver.optimality(objective, w, batch))
    floor = rounding_level(value, w).astype(residual.dtype)
    unmet = (tol > 0) & (residual > jnp.maximum(tol.astype(residual.dtype), floor))
    finite = jnp.isfinite(residual) & jnp.isfinite(value) & tree.all_finite(w)
    code = status.combine(
        status.where(unmet, Status.MAX_STEPS), status.where(~finite, Status.NONFINITE)
    )
    return SolveInfo(value, residual, jnp.asarray(num_steps, jnp.int32), code)


def run_until(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    state: Any,
    batch: Any,
    tol: Scalar,
    budget: Array | int | None = None,
) -> tuple[Tree, Any, Array]:
    """Steps until the residual is at most `tol`, at most `budget` of them: `(w, state, steps)`.

    `budget` is the solver's `max_steps` where it is None.
    """
    budget = solver.max_steps if budget is None else budget

    def is_going(carry: tuple[Tree, Any, Array]) -> Array:
        _, state, steps = carry
        return is_open(state, steps, tol, budget)

    def body(carry: tuple[Tree, Any, Array]) -> tuple[Tree, Any, Array]:
        return advance(solver, objective, *carry, batch, tol)

    return jax.lax.while_loop(is_going, body, (w, state, jnp.int32(0)))


def is_open(state: Any, steps: Array, tol: Scalar, budget: Array | int) -> Array:
    """Whether a solve goes on."""
    unmet = state.residual > tol.astype(state.residual.dtype)  # False for NaN: stop
    stalled = getattr(state, "stalled", jnp.asarray(False))
    return (steps < budget) & unmet & ~stalled


def advance(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    state: Any,
    steps: Array,
    batch: Any,
    tol: Scalar,
) -> tuple[Tree, Any, Array]:
    """One step of a solve to a tolerance: `(w, state, steps)`."""
    new_w, state = solver.step(objective, w, state, batch)
    if not solver.lagged:
        return new_w, state, steps + 1
    # The residual belongs to the point before the step: keep that point where it is good enough.
    met = state.residual <= tol.astype(state.residual.dtype)
    return tree.where(met, w, new_w), state, jnp.where(met, steps, steps + 1)


def run_steps(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    state: Any,
    sampler: Sampler,
    num_steps: int,
    *,
    start: int = 0,
    checkpoint: bool = False,
) -> tuple[Tree, Any]:
    """Exactly `num_steps` steps (static), differentiable in reverse mode: `(w, state)`.

    `checkpoint` stores the state every sqrt(num_steps) steps and recomputes the rest, and recomputes
    what is inside each step: memory about 2 sqrt(T) states instead of T times all intermediates, for
    one more forward pass (Griewank and Walther 2000).
    """

    def step(carry: tuple[Tree, Any], index: Array) -> tuple[tuple[Tree, Any], None]:
        w, state = carry
        return solver.step(objective, w, state, sampler(index)), None

    carry = (w, state)
    if not checkpoint:
        carry, _ = jax.lax.scan(step, carry, start + jnp.arange(num_steps))
        return carry

    step = jax.checkpoint(step, prevent_cse=False)

    def segment(carry: tuple[Tree, Any], indices: Array) -> tuple[tuple[Tree, Any], None]:
        return jax.lax.scan(step, carry, indices)

    length = math.isqrt(num_steps)
    whole = num_steps - num_steps % max(length, 1)
    if whole:
        indices = start + jnp.arange(whole).reshape(-1, length)
        carry, _ = jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), carry, indices)
    if whole < num_steps:
        carry, _ = segment(carry, start + jnp.arange(whole, num_steps))
    return carry
