"""Many inner problems at once: a lane that has converged loads the next problem."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from solvers.base import AbstractInnerSolver
from solvers.loops import advance, budget_of, is_open, judge, run_until, stop_level, tolerance
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

    The numbers are those of solving one by one, to the rounding of a batched product.

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
    queue = _Queue(w, state, batches, stop_level(limit, one), jnp.broadcast_to(budget, (count,)))

    def start(i: Array) -> tuple[_Lane, Tree, Any]:
        """Problem i at its beginning."""
        item: _Queue = _take(queue, i)
        if state is None:
            begun = solver.init(objective, item.w, item.batch)
        else:
            begun = solver.restart(objective, item.w, item.state, item.batch)
        return _Lane(i, jnp.int32(0), item.tol, item.budget, item.batch), item.w, begun

    def whole(i: Array) -> tuple[Tree, Any, Array]:
        at, x, s = start(i)
        x, s, steps = run_until(solver, objective, x, s, at.batch, at.tol, at.budget)
        return x, None if state is None else s, steps

    everything = jnp.arange(count, dtype=jnp.int32)
    if lanes == 1:
        w, state, steps = jax.lax.map(whole, everything)
        spent = jnp.sum(steps)
    elif lanes == count:
        w, state, steps = jax.vmap(whole)(everything)
        spent = count * jnp.max(steps)
    else:
        if tail is None:
            tail = lanes // 2 if jax.default_backend() == "cpu" else 0
        w, state, steps, spent = _refilled(solver, objective, queue, start, lanes, tail)

    def verdict(item: tuple) -> SolveInfo:
        x, batch, taken, limit, s = item
        judged = solver if s is None else solver.settled(s)
        return judge(judged, objective, x, batch, taken, limit)

    # `judge` of a map by its own step length needs the state; without states it recomputes.
    items = (w, batches, steps, limit, state)
    inner = jax.lax.map(verdict, items, batch_size=lanes if lanes > 1 else None)
    return w, state, LanesInfo(inner, spent)


class _Queue(NamedTuple):
    """All problems; results take the place of what was loaded."""

    w: Tree
    state: Any
    batch: Any
    tol: Array
    budget: Array


class _Lane(NamedTuple):
    """What a lane knows beside the solver's own numbers; stacked over lanes."""

    problem: Array
    """Its number; N for an idle lane."""
    steps: Array
    tol: Array
    budget: Array
    batch: Any


def _take(rows: Any, i: Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), rows)


def _put(rows: Any, i: Array, row: Any) -> Any:
    """In place where the buffer is a loop's own. A row number beyond the end writes nothing."""
    return jax.tree.map(lambda leaf, new: leaf.at[i].set(new, mode="drop"), rows, row)


def _refilled(
    solver: AbstractInnerSolver,
    objective: ObjectiveFn,
    queue: _Queue,
    start: Any,
    lanes: int,
    tail: int,
) -> tuple[Tree, Any, Array, Array]:
    count = queue.tol.shape[0]
    keep_state = queue.state is not None

    def done(at: _Lane, s: Any) -> Array:
        return (at.problem < count) & ~is_open(s, at.steps, at.tol, at.budget)

    def step_all(at: _Lane, x: Tree, s: Any, spent: Array) -> tuple[_Lane, Tree, Any, Array]:
        """Steps of all lanes until one of them is done."""

        def step(carry):
            x, s, steps, spent = carry
            step_one = lambda x, s, n, batch, tol: advance(solver, objective, x, s, n, batch, tol)
            x, s, steps = jax.vmap(step_one)(x, s, steps, at.batch, at.tol)
            return x, s, steps, spent + lanes

        def none_done(carry):
            _, s, steps, _ = carry
            return ~jnp.any(done(at._replace(steps=steps), s))

        x, s, steps, spent = jax.lax.while_loop(none_done, step, (x, s, at.steps, spent))
        return at._replace(steps=steps), x, s, spent

    def write(out, i: Array, x: Tree, s: Any, steps: Array):
        ws, states, all_steps = out
        states = _put(states, i, s) if keep_state else None
        return _put(ws, i, x), states, _put(all_steps, i, steps)

    def refill(carry):
        """Write out the first lane that is done, and load the next problem there."""
        at, x, s, out, following = carry
        lane = jnp.argmax(done(at, s))
        out = write(out, at.problem[lane], _take(x, lane), _take(s, lane), at.steps[lane])

        def load(lanes_now):
            return _put(lanes_now, lane, start(following))

        def rest(lanes_now):
            at, x, s = lanes_now
            return at._replace(problem=at.problem.at[lane].set(count)), x, s

        at, x, s = jax.lax.cond(following < count, load, rest, (at, x, s))
        return at, x, s, out, jnp.minimum(following + 1, count)

    def cycle(carry):
        at, x, s, out, following, spent = carry
        at, x, s, spent = step_all(at, x, s, spent)
        any_done = lambda carry: jnp.any(done(carry[0], carry[2]))
        at, x, s, out, following = jax.lax.while_loop(any_done, refill, (at, x, s, out, following))
        return at, x, s, out, following, spent

    def busy(carry):
        at, _, _, _, following, _ = carry
        return (following < count) | (jnp.sum(at.problem < count) > tail)

    at, x, s = jax.vmap(start)(jnp.arange(lanes, dtype=jnp.int32))
    out = (queue.w, queue.state, jnp.zeros(count, jnp.int32))
    carry = (at, x, s, out, jnp.int32(lanes), jnp.int32(0))
    at, x, s, out, _, spent = jax.lax.while_loop(busy, cycle, carry)
    if not tail:
        return *out, spent

    def finish(lane, carry):
        out, spent = carry
        own, x_own, s_own = _take((at, x, s), lane)
        left = jnp.where(own.problem < count, own.budget - own.steps, 0)
        x_own, s_own, steps = run_until(solver, objective, x_own, s_own, own.batch, own.tol, left)
        return write(out, own.problem, x_own, s_own, own.steps + steps), spent + steps

    out, spent = jax.lax.fori_loop(0, lanes, finish, (out, spent))
    return *out, spent
