"""Many inner problems at once: a lane that has converged loads the next problem."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers.base import AbstractInnerSolver
from solvers.loops import advance, budget_of, is_open, judge, stop_level, tolerance
from solvers.refill import Work, put, refilled, run_alone, take
from solvers.types import ObjectiveFn, SolveInfo, Tree


class LanesInfo(NamedTuple):
    """What was spent on a set of problems."""

    inner: SolveInfo
    """Of each problem: fields of shape (N,)."""
    lane_steps: Array
    """Steps taken by all lanes, idle or not, int32; `inner.num_steps` sums to the useful ones."""


def solve_many(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    w: Tree,
    batches: Any,
    *,
    lanes: int,
    state: Any = None,
    tol: Array | float | None = None,
    max_steps: Array | int | None = None,
    tail: int | None = None,
) -> tuple[Tree, Any, LanesInfo]:
    """Minimise `objective(w[i], batches[i])` for each i of N, on `lanes` lanes: `(w, state, info)`.

    One lane is the loop over problems one by one, N lanes are `vmap` of the solve, which waits for the
    slowest. In between all lanes step together until one of them is done; its result is written out and
    the next problem loaded in its place, so that every step of every lane is of use until the problems
    run out. No lane is ever masked. When at most `tail` are still at work, these end one by one.

    The numbers are those of solving one by one, to the rounding of a batched product: of a step, that is. Some solvers
    keep it small (gradient descent, float32: the same step counts, solutions within 2e-6), L-BFGS lets it grow: other
    last digits bend its path, to another point that meets the tolerance, and two of these are up to `2 tol / mu` apart
    where the curvature is at least `mu`. In float32, 256 ridge or logistic problems with penalties over six orders of
    magnitude (`benchmarks/w4.py`, tol 1e-4, 2 CPU cores): up to 64 unknowns, 2 to 16 lanes gave the bits of one, 32
    changed up to 5 step counts and solutions by up to 3.5e-3, and 256, which is `vmap`, up to 157 step counts and
    solutions by up to 0.4; with 1024 unknowns no step count changed, and from 4 lanes on solutions by up to 2.3e-4. All
    met the tolerance.

    Args:
      w, batches: trees whose leaves have the N problems as first axis.
      state: solver states to go on from (`restart`), of the same kind; None starts anew and returns None.
      tol, max_steps: one number or N of them; None is the solver's own.
      tail: None is half the lanes on a CPU, where a step of one costs little, and 0 elsewhere.

    Cost: the steps of all problems, and per problem one start, one value and one gradient more. Memory:
    `lanes` copies of `w`, `state` and a batch beside the arguments.
    """
    count = jax.tree.leaves(w)[0].shape[0]
    lanes = min(lanes, count)
    one = jax.tree.map(lambda leaf: leaf[0], w)
    limit = (
        tolerance(solver, one) if tol is None else jnp.asarray(tol, tolerance(solver, one).dtype)
    )
    limit = jnp.broadcast_to(limit, (count,))
    budget = jnp.asarray(budget_of(solver) if max_steps is None else max_steps).astype(jnp.int32)
    queue = (
        w,
        state,
        _Stays(batches, stop_level(limit, one), jnp.broadcast_to(budget, (count,))),
    )
    keep_state = state is not None

    def start(i: Array) -> tuple[_Stays, _Moving]:
        x, own, stays = take(queue, i)
        if own is None:
            begun = solver.init(objective, x, stays.batch)
        else:
            begun = solver.restart(objective, x, own, stays.batch)
        return stays, _Moving(x, begun, jnp.int32(0))

    def stepper(stays: _Stays) -> Any:
        def step(m: _Moving) -> _Moving:
            return _Moving(
                *advance(solver, objective, m.w, m.state, m.steps, stays.batch, stays.tol)
            )

        return step

    def done(stays: _Stays, m: _Moving) -> Array:
        return ~is_open(m.state, m.steps, stays.tol, stays.budget)

    def write(out: Any, i: Array, stays: _Stays, m: _Moving) -> Any:
        return put(out, i, (m.w, m.state if keep_state else None, m.steps))

    work = Work(start, stepper, done, write)

    def whole(i: Array) -> tuple[Tree, Any, Array]:
        m, _ = run_alone(work, *start(i))
        return m.w, m.state if keep_state else None, m.steps

    everything = jnp.arange(count, dtype=jnp.int32)
    if lanes == 1:
        w, state, steps = jax.lax.map(whole, everything)
        spent = jnp.sum(steps)
    elif lanes == count:
        w, state, steps = jax.vmap(whole)(everything)
        spent = count * jnp.max(steps)
    else:
        out = (w, state, jnp.zeros(count, jnp.int32))
        (w, state, steps), spent = refilled(work, out, count, lanes, tail)

    def verdict(item: tuple) -> SolveInfo:
        x, batch, taken, limit, s = item
        judged = solver if s is None else solver.settled(s)
        return judge(judged, objective, x, batch, taken, limit)

    # `judge` of a map by its own step length needs the state; without states it recomputes.
    items = (w, batches, steps, limit, state)
    inner = jax.lax.map(verdict, items, batch_size=lanes if lanes > 1 else None)
    return w, state, LanesInfo(inner, spent)


class _Stays(NamedTuple):
    """What a lane knows beside the solver's own numbers."""

    batch: Any
    tol: Array
    budget: Array


class _Moving(NamedTuple):
    w: Tree
    state: Any
    steps: Array
